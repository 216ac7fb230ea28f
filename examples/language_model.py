"""Small language model of bytes: trained, then used to show what a KV cache saves.

    python examples/language_model.py                       # under four minutes on two cores
    python examples/language_model.py --attention mqa --window 64 --text novel.txt --plot time.png

The tokens are bytes, so no vocabulary has to be downloaded; the text is the language reference that comes with Python.
After the training the program shows three things:

(a) it continues a prompt with the cache and without it: the same tokens, in less time;
(b) it counts the bytes of the cache for each of the three attention modules;
(c) it reads all of the held-out text through a sliding window, with a cache that does not grow.

Training takes a fixed number of steps, so tokens and bits per byte are the same in every run on a machine, however busy
it is; only the times differ. The model itself is in `byte_model.py`. `--save` writes it in the format of Hugging
Face, for other examples, for `python -m transformer chat`, and for other libraries.
"""

import argparse
import codecs
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from byte_model import CHUNK, HEADS, LAYERS, bits_per_byte, new_model, train
from byte_text import ngram_bits, read_bytes
from transformer import DecoderOnlyTransformer
from transformer.checkpoints import save_model
from transformer.extras import require
from transformer.kernels import warm_up

# --- (a) The same tokens with the cache and without ---------------------------------------------------------------


def continuation(
    model: DecoderOnlyTransformer, prompt: Tensor, count: int, temperature: float, seed: int, use_cache: bool
) -> Iterator[tuple[int, float]]:
    """The `count` tokens after a prompt `[1, L]`, one by one, each with the seconds that it took.

    With a cache each step computes one new token. Without a cache each step computes the whole text again.
    """
    generator = torch.Generator().manual_seed(seed)
    options = {"max_new_tokens": count, "temperature": temperature, "generator": generator, "use_cache": use_cache}
    start = time.perf_counter()
    for token in model.stream(prompt, **options):
        yield token.item(), time.perf_counter() - start
        start = time.perf_counter()


def show_continuation(
    model: DecoderOnlyTransformer, prompt: Tensor, count: int, temperature: float, seed: int
) -> tuple[Tensor, list[float], list[float]]:
    """Prints the text, and gives all of its tokens `[1, L]` and the seconds per token with the cache and without."""
    from tqdm import tqdm  # here, so that `--help` needs no extra

    print(f"\n(a) {count:,} tokens after a prompt of {prompt.shape[1]}\n")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(decoder.decode(bytes(prompt[0].tolist())), end="", flush=True)
    tokens, with_cache = [], []
    for token, seconds in continuation(model, prompt, count, temperature, seed, use_cache=True):
        print(decoder.decode(bytes([token])), end="", flush=True)
        tokens.append(token)
        with_cache.append(seconds)
    print("\n")
    uncached = continuation(model, prompt, count, temperature, seed, use_cache=False)
    uncached = tqdm(uncached, desc="the same without the cache", total=count, leave=False)
    tokens_again, without = map(list, zip(*uncached, strict=True))
    if tokens != tokens_again:
        raise SystemExit("with the cache and without it the tokens differ")
    print("    both ways gave the same tokens")
    print(f"    with the cache     {count / sum(with_cache):8,.0f} tokens/s")
    print(f"    without the cache  {count / sum(without):8,.0f} tokens/s")
    print(f"    speed-up           {sum(without) / sum(with_cache):8.1f} times")
    return torch.cat([prompt, torch.tensor([tokens])], dim=1), with_cache, without


# --- (b) Bytes of the cache ---------------------------------------------------------------------------------------


@torch.inference_mode()
def show_cache_sizes(text: Tensor, groups: int, window: int) -> None:
    """Prints the cache size of each attention module after it has read a text `[1, L]`."""
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


# --- (c) A long text through a window -----------------------------------------------------------------------------


def show_long_text(
    model: DecoderOnlyTransformer, text: Tensor, cut: int, window: int, untrained: float
) -> tuple[float, float, int]:
    """Gives the bits per byte of the held-out text by byte trigrams and by the model, and the bytes of its cache."""
    count = len(text) - cut
    print(f"\n(c) {count:,} held-out bytes in chunks of {CHUNK}, through a window of {window}\n")
    start = time.perf_counter()
    trained, sizes = bits_per_byte(model, text, cut)
    seconds = time.perf_counter() - start
    if len(sizes) > 1:
        raise SystemExit(f"the bytes of the cache did not stay constant: {sizes}")
    (size,) = sizes
    print(f"    {count / seconds:,.0f} tokens/s; the cache's bytes stayed constant at {size:,} (allocated)\n")
    print("    bits per byte of the held-out text:")
    bigrams, trigrams = (ngram_bits(text, cut, order) for order in (1, 2))
    print(f"    byte bigrams, counted    {bigrams:6.2f}")
    print(f"    byte trigrams, counted   {trigrams:6.2f}")
    print(f"    this model, untrained    {untrained:6.2f}")
    print(f"    this model, trained      {trained:6.2f}")
    return trigrams, trained, size


# --- The plot -----------------------------------------------------------------------------------------------------


def plot_times(path: Path, prompt_length: int, with_cache: list[float], without: list[float], window: int) -> None:
    """Draws milliseconds per token against the tokens before it, with the cache and without, and marks the window."""
    from matplotlib.figure import Figure  # here, since only --plot needs it

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for seconds, label in ((without, "without the cache"), (with_cache, "with the cache")):
        # Medians of neighbours: a single token may have waited for another program.
        near = min(15, len(seconds))
        medians = torch.tensor(seconds).unfold(0, near, 1).median(dim=1).values
        contexts = prompt_length + near // 2 + torch.arange(len(medians))
        axes.plot(contexts, medians * 1000, label=label)
    if window <= prompt_length + len(with_cache):
        axes.axvline(window, color="black", linestyle="--", linewidth=1, label=f"window full: {window} tokens")
    axes.set(xlabel="context (tokens)", ylabel="time per token (ms)", ylim=(0, None))
    axes.set_title("Time of one more token, with the KV cache and without it")
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"\ntime per token against context: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small language model, and show what its KV cache saves.")
    parser.add_argument("--attention", choices=["mha", "mqa", "gqa"], default="gqa", help="(default: %(default)s)")
    parser.add_argument("--groups", type=int, default=2, help="key/value heads of gqa (default: %(default)s)")
    parser.add_argument("--window", type=int, default=128, help="tokens that a byte looks at (default: %(default)s)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to learn (default: Python's own reference)")
    parser.add_argument("--prompt", default="When a function is called, ", help="text to continue")
    parser.add_argument(
        "--temperature", type=float, default=0.5, help="0: the most probable byte (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=1000, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the time per token against the context")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the model, in the format of Hugging Face")
    parser.add_argument("--steps", type=int, default=500, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args()
    require("examples", "tqdm", *["safetensors"] * bool(options.save), *["matplotlib"] * bool(options.plot))

    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # tensors this small gain little from more, and the result would depend on the number
    if options.window < 1 or options.groups < 1 or HEADS % options.groups:
        parser.error(f"--window, --groups: expected a window of at least 1, and a divisor of {HEADS}")
    if options.text and not options.text.is_file():
        parser.error(f"--text: expected a file, got {options.text}")
    text, cut = read_bytes(options.text)
    length = max(128, options.window)  # so that training meets every distance there is
    if cut <= length:
        parser.error(f"--text: expected more than {length * 20 // 19:,} bytes, got {len(text):,}")
    if not options.prompt or options.tokens < 1:
        parser.error("--prompt, --tokens: expected at least one byte of each")
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    if options.plot and not options.plot.parent.is_dir():
        parser.error(f"--plot: expected a file in a folder that exists, got {options.plot}")
    if options.save and not options.save.parent.is_dir():
        parser.error(f"--save: expected a place in a folder that there is, got {options.save.parent}")
    if options.save and options.save.exists():
        parser.error(f"--save: expected a folder that does not exist yet, got {options.save}")
    prompt = torch.tensor([list(options.prompt.encode())])

    model = new_model(options.attention, options.groups, options.window)
    parameters = sum(weight.numel() for weight in model.parameters())
    module = type(model.decoder_blocks()[0].attention).__name__
    print(f"{module} in {LAYERS} layers, {parameters:,} parameters;", end=" ")
    print(f"{cut:,} bytes to learn, {len(text) - cut:,} held out", flush=True)
    untrained, _ = bits_per_byte(model, text, cut)
    train(model, text[:cut], length, options.steps)
    model.eval()
    warm_up(model)
    if options.save:
        save_model(model, options.save)
        print(f"saved: {options.save}; chat with it: python -m transformer chat {options.save}", flush=True)
    written, with_cache, without = show_continuation(model, prompt, options.tokens, options.temperature, options.seed)
    show_cache_sizes(written, options.groups, options.window)
    trigrams, trained, size = show_long_text(model, text, cut, options.window, untrained)
    if options.plot:
        plot_times(options.plot, prompt.shape[1], with_cache, without, options.window)
    print(
        f"\nShown: with the cache the model writes the same {options.tokens:,} tokens as without it, "
        f"{sum(without) / sum(with_cache):.1f} times as fast.\nA window of {options.window} tokens keeps the cache at "
        f"{size:,} bytes over {len(text) - cut:,} bytes of text.\n{options.steps:,} training steps took the model from "
        f"{untrained:.2f} to {trained:.2f} bits per byte of held-out text; byte trigrams need {trigrams:.2f}."
    )


if __name__ == "__main__":
    main()
