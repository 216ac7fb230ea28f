"""Several conversations on one model, each of which computes its new tokens only.

    python examples/chat.py                                 # under two minutes on two cores
    python examples/chat.py --model FOLDER                  # of `language_model.py --window 256 --save FOLDER`

The model continues text in the style of Python's reference, so a prompt is the beginning of a paragraph. Ada and Ben
each have a conversation: one is forked for a second answer, one is truncated and gets another prompt, and one is saved
and continued in a new process. Each answer is also generated from the whole conversation without a cache: the answer,
in [brackets], is the same, and a table at the end shows the cost of both.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from byte_model import load_or_train
from transformer import DecoderOnlyTransformer, KVCache
from transformer.checkpoints import save_model
from transformer.errors import CacheStateError
from transformer.extras import require

TEMPERATURE = 0.4

# Tokens in the window of a byte: enough for two turns, so that one turn can be truncated without a loss of keys.
WINDOW = 256

# Ada's last prompt: it is answered once in this process, and once in a new process that loads the file.
LAST_PROMPT = "\n\nThe value of "


# --- A conversation ---------------------------------------------------------------------------------------------


@dataclass
class Conversation:
    """The text so far and its caches, which contain all of it except an unanswered prompt."""

    text: list[int]
    cache: KVCache

    def fork(self) -> "Conversation":
        """A second conversation that begins like this one. It shares memory until one of the two continues."""
        return Conversation(list(self.text), self.cache.fork())

    def roll_back(self, length: int) -> None:
        """Removes all text after the first `length` bytes."""
        del self.text[length:]
        try:
            self.cache.truncate(min(self.cache.length, length))
        except CacheStateError:
            # The window has evicted keys that are needed there, so the text is read again.
            self.cache.clear()

    def save(self, path: Path) -> None:
        """Writes the caches into one file, and the text into another."""
        path.with_suffix(".txt").write_bytes(bytes(self.text))
        self.cache.save(path)

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """The conversation that `save` wrote."""
        return cls(list(path.with_suffix(".txt").read_bytes()), KVCache.load(path))


def new_conversation(model: DecoderOnlyTransformer, text: Iterable[int]) -> Conversation:
    """A conversation without cached tokens. Between answers, the model itself has no caches."""
    return Conversation(list(text), model.kv_cache.remove(model))


# --- A turn -----------------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """Cost of an answer: tokens computed, seconds to its first and to its last byte, bytes of the cache."""

    computed: int
    first: float
    last: float
    nbytes: int


def answer(model: DecoderOnlyTransformer, conversation: Conversation, tokens: int, seed: int) -> Cost:
    """Reads the text that is not cached yet, and generates up to a full stop, at most `tokens` bytes."""
    text, cache = conversation.text, conversation.cache
    generator = torch.Generator().manual_seed(seed)
    seen, start, times = cache.length, time.perf_counter(), []
    options = {"max_new_tokens": tokens, "stop_tokens": [ord(".")], "temperature": TEMPERATURE, "generator": generator}
    cache.install(model)
    for token in model.stream(torch.tensor([text[seen:]]), **options):
        text.append(token.item())
        times.append(time.perf_counter() - start)
    cache.remove(model)
    return Cost(cache.length - seen, times[0], times[-1], cache.nbytes_used)


def take_turn(
    model: DecoderOnlyTransformer, name: str, conversation: Conversation, prompt: str, tokens: int, seed: int = 0
) -> tuple[str, Cost, Cost]:
    """Prints a prompt and [its answer]: a line of the table, with the cost of the same answer from the start."""
    conversation.text += prompt.encode()
    begin = len(conversation.text)
    afresh = new_conversation(model, conversation.text)
    costs = answer(model, conversation, tokens, seed), answer(model, afresh, tokens, seed)
    if conversation.text != afresh.text:
        raise SystemExit(f"{name}: the cache changed what was written")
    said = f"{prompt}[{bytes(conversation.text[begin:]).decode('utf-8', 'replace')}]"
    print(f"{name:>14} | " + said.strip("\n").replace("\n", f"\n{'':14} | "), end="\n\n", flush=True)
    return name, *costs


# --- The chat ---------------------------------------------------------------------------------------------------


def chat(model: DecoderOnlyTransformer, tokens: int, folder: Path) -> list[tuple[str, Cost, Cost]]:
    """All turns, in order."""
    answer(model, new_conversation(model, b"Warm "), tokens, seed=0)  # a machine's first steps are slow: not measured
    ada, ben = new_conversation(model, b""), new_conversation(model, b"")
    rows = [
        take_turn(model, "Ada", ada, "When a function is called, ", tokens),
        take_turn(model, "Ben", ben, "The following example ", tokens),
    ]

    # Ada wants a second answer. The fork has read the prompt: with its answer only the prompt's
    # last byte is removed, which is read again to give the next byte's logits.
    prompt = "\n\nIf an exception is raised, "
    asked = len(ada.text) + len(prompt)
    rows.append(take_turn(model, "Ada", ada, prompt, tokens))
    other = ada.fork()
    other.roll_back(asked - 1)
    rows.append(take_turn(model, "Ada, again", other, prompt[-1:], tokens, seed=1))

    # Ben removes his prompt and its answer, and asks something else.
    before = len(ben.text)
    rows.append(take_turn(model, "Ben", ben, "\n\nA class ", tokens))
    ben.roll_back(before)
    rows.append(take_turn(model, "Ben, instead", ben, "\n\nA module ", tokens))

    # Ada leaves, and continues in a new process.
    path = folder / "ada.safetensors"
    ada.save(path)
    save_model(model, folder / "model")
    rows.append(take_turn(model, "Ada", ada, LAST_PROMPT, tokens))
    options = ["--model", folder / "model", "--resume", path, "--tokens", str(tokens)]
    resumed = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, check=True).stdout
    if resumed != bytes(ada.text):
        raise SystemExit("the new process wrote something else than this one")
    print(f"a new process went on from Ada's file of {path.stat().st_size:,} bytes, and gave the same last answer")
    return rows


def resume(model: DecoderOnlyTransformer, path: Path, tokens: int) -> None:
    """Answers the last prompt after a saved conversation, and writes out all of its text."""
    conversation = Conversation.load(path)
    conversation.text += LAST_PROMPT.encode()
    answer(model, conversation, tokens, seed=0)
    sys.stdout.buffer.write(bytes(conversation.text))


def print_table(rows: list[tuple[str, Cost, Cost]]) -> None:
    print("read again from its start, every conversation got the same answer\n")
    print("Tokens computed, milliseconds to the first byte and to the last, bytes of the cache:\n")
    print(f"{'':14}{'going on from the cache':^36}   {'from the start':^36}")
    print(f"{'':14}" + "   ".join(2 * [f"{'tokens':>6}{'first ms':>10}{'last ms':>9}{'cache':>11}"]))
    for name, *costs in rows:
        numbers = (f"{c.computed:6,}{c.first * 1e3:10.1f}{c.last * 1e3:9.1f}{c.nbytes:11,}" for c in costs)
        print(f"{name:14}" + "   ".join(numbers))
    print("\nShown: every answer is the same from the cache as from the start, where all tokens are computed again.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Several conversations on one model.")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a trained one (default: train one now)")
    parser.add_argument("--steps", type=int, default=300, help="training steps without --model (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="of an answer at the most (default: %(default)s)")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="answer the last prompt after a saved conversation")
    options = parser.parse_args()
    if options.tokens < 1 or (options.resume and not options.resume.is_file()):
        parser.error(f"--tokens, --resume: expected at least 1 and a file, got {options.tokens} and {options.resume}")
    require("examples", "safetensors", *["tqdm"] * (options.model is None))
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors this small gain little from more, and threads wait for each other
    model = load_or_train(options.model, WINDOW, options.steps)
    if options.resume:
        resume(model, options.resume, options.tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        print_table(chat(model, options.tokens, Path(folder)))


if __name__ == "__main__":
    main()
