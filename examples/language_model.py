"""A small language model, trained and put to work.

    python examples/language_model.py                       # under four minutes on two cores
    python examples/language_model.py --attention mqa --window 64 --text novel.txt --plot time.png

It reads bytes, so there is no vocabulary to fetch, and learns from the language reference that every Python carries.
Then it shows what a cache is for:

(a) it continues a prompt with its cache and without: the same tokens, in a fraction of the time;
(b) it counts the cache's bytes for each of the three attention modules;
(c) it reads all of the held-out text through its sliding window, in memory that does not grow.

The model itself stands in `byte_model.py`. With --save it is kept in the format of Hugging
Face: other examples can go on with it, `python -m transformer chat` too, and other libraries.
"""

import argparse
import codecs
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from byte_model import HEADS, LAYERS, new_model, train
from byte_text import ngram_bits, read_bytes
from transformer import DecoderOnlyTransformer
from transformer.checkpoints import save_model

# Bytes that (c) reads at a time; any number gives the same answers.
CHUNK = 512


# --- What the cache is for --------------------------------------------------------------------------------------


def continuation(
    model: DecoderOnlyTransformer, prompt: Tensor, count: int, temperature: float, seed: int, use_cache: bool
) -> Iterator[tuple[int, float]]:
    """The `count` tokens after a prompt `[1, L]`, one by one, each with the seconds that it took.

    With a cache the model reads what it has not read yet: one byte. Without one it reads all of the text again.
    """
    dice = torch.Generator().manual_seed(seed)
    options = {"max_new_tokens": count, "temperature": temperature, "generator": dice, "use_cache": use_cache}
    start = time.perf_counter()
    for token in model.stream(prompt, **options):
        yield token.item(), time.perf_counter() - start
        start = time.perf_counter()


def show_continuation(
    model: DecoderOnlyTransformer, prompt: Tensor, count: int, temperature: float, seed: int
) -> tuple[Tensor, list[float], list[float]]:
    """(a) The same tokens with the cache and without: the whole text `[1, L]`, and both ways' seconds per token."""
    print(f"\n(a) {count:,} tokens after a prompt of {prompt.shape[1]}\n")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(decoder.decode(bytes(prompt[0].tolist())), end="", flush=True)
    tokens, with_cache = [], []
    for token, seconds in continuation(model, prompt, count, temperature, seed, use_cache=True):
        print(decoder.decode(bytes([token])), end="", flush=True)
        tokens.append(token)
        with_cache.append(seconds)
    print("\n")
    once_more = continuation(model, prompt, count, temperature, seed, use_cache=False)
    once_more = tqdm(once_more, desc="once more, without the cache", total=count, leave=False)
    tokens_again, without = map(list, zip(*once_more, strict=True))
    if tokens != tokens_again:
        raise SystemExit("the cache changed what was written")
    print("    both ways gave the same tokens")
    print(f"    with the cache     {count / sum(with_cache):8,.0f} tokens/s")
    print(f"    without the cache  {count / sum(without):8,.0f} tokens/s")
    print(f"    speed-up           {sum(without) / sum(with_cache):8.1f} times")
    return torch.cat([prompt, torch.tensor([tokens])], dim=1), with_cache, without


@torch.inference_mode()
def show_cache_sizes(text: Tensor, groups: int, window: int) -> None:
    """(b) What each of the modules keeps of a text `[1, L]`, measured after reading it."""
    print(f"\n(b) bytes of the cache after {text.shape[1]:,} tokens, {LAYERS} layers in float32\n")
    print(f"    {'':24}{'all tokens':>12}{f'window of {window}':>16}")
    for kind, heads in (("mha", HEADS), ("gqa", groups), ("mqa", 1)):
        model = new_model(kind, groups, window).eval().enable_cache()  # untrained: the bytes are the same
        sizes = []
        for expanding in (True, False):
            model(text, expanding_context=expanding)
            sizes.append(model.kv_cache.nbytes_used)
            model.clear_cache()
        print(f"    {f'{kind.upper()}, {heads} key/value heads':24}{sizes[0]:12,}{sizes[1]:16,}")


@torch.inference_mode()
def show_long_text(model: DecoderOnlyTransformer, text: Tensor, cut: int, window: int) -> None:
    """(c) All of the held-out text through the sliding window, each byte judged by what the model read before it."""
    count = len(text) - cut
    print(f"\n(c) {count:,} held-out bytes in chunks of {CHUNK}, through a window of {window}\n")
    model.enable_cache()
    nats, sizes, start = 0.0, set(), time.perf_counter()
    chunks = zip(text[cut - 1 : -1].split(CHUNK), text[cut:].split(CHUNK), strict=True)
    for chunk, next_bytes in tqdm(chunks, desc="reading", total=math.ceil(count / CHUNK), leave=False):
        logits = model(chunk[None], expanding_context=False)[0]
        nats += F.cross_entropy(logits, next_bytes, reduction="sum").item()
        sizes.add(model.kv_cache.nbytes)
    seconds = time.perf_counter() - start
    if len(sizes) > 1:
        raise SystemExit(f"the cache's bytes did not stay constant: {sizes}")
    print(f"    {count / seconds:,.0f} tokens/s; the cache's bytes stayed constant at {sizes.pop():,}\n")
    print("    bits per byte of the held-out text:")
    for order in (1, 2):
        print(f"    byte n-grams of order {order}  {ngram_bits(text, cut, order):6.2f}")
    print(f"    this model               {nats / count / math.log(2):6.2f}")


def plot_times(path: Path, prompt_length: int, with_cache: list[float], without: list[float]) -> None:
    """Milliseconds per token against the context that it was written after, for both ways."""
    from matplotlib.figure import Figure  # here, since nothing else needs it

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for seconds, label in ((without, "reading all again"), (with_cache, "with the cache")):
        # Medians of neighbours: a single token may have waited for something else that the machine did.
        near = min(15, len(seconds))
        medians = torch.tensor(seconds).unfold(0, near, 1).median(dim=1).values
        contexts = prompt_length + near // 2 + torch.arange(len(medians))
        axes.plot(contexts, medians * 1000, label=label)
    axes.set(xlabel="tokens of context", ylabel="milliseconds per token", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"\ntime per token against context: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small language model, and see what its cache is for.")
    parser.add_argument("--attention", choices=["mha", "mqa", "gqa"], default="gqa")
    parser.add_argument("--groups", type=int, default=2, help="key/value heads of gqa (default: %(default)s)")
    parser.add_argument("--window", type=int, default=128, help="tokens that a byte looks at (default: %(default)s)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what to learn (default: Python's own reference)")
    parser.add_argument("--prompt", default="When a function is called, ", help="what to continue")
    parser.add_argument("--temperature", type=float, default=0.5, help="0: the likeliest byte (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1000, help="how many to write (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time per token against context")
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", help="keep the trained model, in the Hugging Face format"
    )
    parser.add_argument("--seconds", type=float, default=90.0, help="time to train (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # tensors this small gain little from more, and threads wait for each other
    text, cut = read_bytes(options.text)
    length = max(128, options.window)  # so that training meets every distance there is
    if cut <= length:
        parser.error(f"--text: expected more than {length * 20 // 19:,} bytes, got {len(text):,}")
    if not options.prompt or options.tokens < 1:
        parser.error("--prompt, --tokens: expected at least one byte of each")
    if options.save and not options.save.parent.is_dir():
        parser.error(f"--save: expected a place in a folder that there is, got {options.save.parent}")
    if options.save and options.save.exists():
        parser.error(f"--save: expected a folder that does not exist yet, got {options.save}")
    prompt = torch.tensor([list(options.prompt.encode())])

    model = new_model(options.attention, options.groups, options.window)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(
        f"{type(model.decoder_blocks()[0].attention).__name__} in {LAYERS} layers, {parameters:,} parameters;", end=" "
    )
    print(f"{cut:,} bytes to learn, {len(text) - cut:,} held out", flush=True)
    train(model, text[:cut], length, options.seconds)
    if options.save:
        save_model(model, options.save)
    model.eval()
    written, with_cache, without = show_continuation(model, prompt, options.tokens, options.temperature, options.seed)
    show_cache_sizes(written, options.groups, options.window)
    show_long_text(model, text, cut, options.window)
    if options.plot:
        plot_times(options.plot, prompt.shape[1], with_cache, without)


if __name__ == "__main__":
    main()
