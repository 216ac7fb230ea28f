"""Random signals during all kinds of calls: `python -m benchmarks.signals --count 2000`.

It prints the state after interrupted calls of each kind. A test runs the same with fewer signals.
"""

import argparse
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer, KVCache, MultiHeadAttention
from transformer.checkpoints import Tokenizer, load_tokenizer
from transformer.cli.conversation import Conversation, SavedConversation, Transcript
from transformer.positions import RotaryEmbedding

from .interrupted import Subject, run, same
from .interrupts import signals
from .timing import print_table


class ModuleStep(Subject):
    """One token of one attention module."""

    options: ClassVar[dict[str, int]] = {}

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return MultiHeadAttention(8, 2, True, True, position=RotaryEmbedding(4), **self.options)

    def call(self) -> object:
        return self.model(torch.ones(1, 1, 8, dtype=torch.float64))


class SlidingModuleStep(ModuleStep):
    """The same over a window with sinks."""

    options: ClassVar[dict[str, int]] = {"window_size": 4, "num_sinks": 1}


class ModelStep(Subject):
    """One token of a whole model."""

    live = True
    prompt = torch.tensor([[1]])

    def build(self) -> nn.Module:
        model = lively(DecoderOnlyTransformer, 16)
        return model.enable_cache() if self.live else model

    def call(self) -> object:
        return self.model(self.prompt)


class Generate(ModelStep):
    """A generation that continues the model's own conversation."""

    prompt = torch.tensor([[1, 2, 3]])

    def call(self) -> object:
        return self.model.generate(self.prompt, max_new_tokens=2)


class GenerateOnItsOwn(Generate):
    """A generation with separate caches, and the forward after it."""

    live = False

    def call(self) -> object:
        return [super().call(), self.model(self.prompt)]


class Beams(Generate):
    """Beam search in the model's own conversation."""

    def call(self) -> object:
        return self.model.generate(self.prompt, max_new_tokens=2, num_beams=2)


class Stream(Generate):
    """Two tokens of an unfinished stream, in the model's own conversation."""

    def call(self) -> object:
        return list(self.parts())

    def parts(self) -> Iterator[object]:
        return islice(self.model.stream(self.prompt, max_new_tokens=9), 2)


class StreamOnItsOwn(Stream):
    """The same with caches of its own."""

    live = False


class SourceGenerate(Subject):
    """A generation of an encoder-decoder with caches on; targets of two lengths alternate."""

    live = True

    def build(self) -> nn.Module:
        model = lively(EncoderDecoderTransformer, 16, 16)
        return model.enable_cache() if self.live else model

    def call(self) -> object:
        length = 1 if self.length() == 3 else 2
        return self.model.generate(torch.tensor([[1, 2, 3, 4]]), max_new_tokens=length)


class SourceGenerateOnItsOwn(SourceGenerate):
    """The same with caches of its own."""

    live = False


class Chat(Subject):
    """A turn in the chat at the terminal, where an interrupt ends the answer."""

    most_tokens = 150

    def build(self) -> nn.Module:
        model = lively(DecoderOnlyTransformer, 256).double().eval()
        self.conversation = Conversation(model, bytes_as_tokens())
        self.reader = lively(DecoderOnlyTransformer, 256).double().eval().enable_cache()
        return model

    def call(self) -> object:
        shown: list[str] = []
        self.conversation.ask("Hi", shown.append, max_new_tokens=3)
        said = self.conversation.transcript
        return ["".join(shown), said.tokens, said.turns]

    def stages(self) -> list[Any]:
        """The conversation before the call, or with a part of the answer."""
        before = self.snapshot()
        self.call()
        said, shortest = self.conversation.transcript, len(self.conversation.transcript.tokens) - 3
        lengths = range(shortest, len(said.tokens) + 1)
        return [
            before,
            *(SavedConversation(Transcript(said.messages, said.tokens[:n], said.turns), before.cache) for n in lengths),
        ]

    def snapshot(self) -> Any:
        return self.conversation.copy()

    def put(self, snapshot: Any) -> None:
        """Restores the transcript only; the tokens are read again."""
        self.conversation.transcript = snapshot.transcript
        self.conversation.cache.clear()

    def is_at(self, snapshot: Any) -> bool:
        """True if the transcript equals the copy and the cache has no other tokens."""
        said, other = self.conversation.transcript, snapshot.transcript
        if (said.tokens, said.turns, len(said.messages)) != (other.tokens, other.turns, len(other.messages)):
            return False
        known = min(self.conversation.cache.length, len(said.tokens))
        if not known:
            return True
        self.reader.clear_cache()
        self.reader(torch.tensor([said.tokens[:known]]))
        layers = zip(self.conversation.cache.layers.values(), KVCache.from_model(self.reader).parts(), strict=True)
        return all(same(layer["key"][:, :, :known], other["key"]) for layer, other in layers)


KINDS: dict[str, type[Subject]] = {
    "module step": ModuleStep,
    "module step, window": SlidingModuleStep,
    "model step": ModelStep,
    "generate, own caches": GenerateOnItsOwn,
    "generate, live": Generate,
    "beams, live": Beams,
    "stream, own caches": StreamOnItsOwn,
    "stream, live": Stream,
    "encoder-decoder, own caches": SourceGenerateOnItsOwn,
    "encoder-decoder, live": SourceGenerate,
    "chat": Chat,
}


def lively(model: type[nn.Module], *vocabularies: int) -> Any:
    """A tiny model whose next token depends on many earlier tokens."""
    torch.manual_seed(0)
    built = model(*vocabularies, 8, 2, 16, 2)
    for parameter in built.decoder.parameters():
        parameter.data.mul_(3)
    return built


@cache
def bytes_as_tokens() -> Tokenizer:
    """The tokenizer of a model of 256 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text('{"vocab_size": 256}', encoding="utf-8")
        return load_tokenizer(folder)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.signals", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *KINDS], help="kinds of calls; all by default")
    parser.add_argument("--count", type=int, default=2000, help="tries of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = ["tries", "interrupted", "wrong", "stuck", "between", "switched", "modes"]
    rows = []
    for name in arguments.names or KINDS:
        tally = run(KINDS[name], signals(KINDS[name], arguments.count, arguments.seed), name)
        rows.append([name, *(f"{getattr(tally, column):,}" for column in columns)])
        print("\n".join([f"{name}: {tally.failures or 'right'}", *tally.first]), flush=True)
    print_table("Random signals", ["what", *columns], rows)


if __name__ == "__main__":
    main()
