"""A small language model, composed of the library's blocks, then trained and put to work.

    python examples/language_model.py                       # under four minutes on two cores
    python examples/language_model.py --attention mqa --window 64 --text novel.txt --plot time.png

It reads bytes, so there is no vocabulary to fetch, and learns from the language reference that every Python carries.
Then it shows what a cache is for:

(a) it continues a prompt with its cache and without: the same tokens, in a fraction of the time;
(b) it counts the cache's bytes for each of the three attention modules;
(c) it reads all of the held-out text through its sliding window, in memory that does not grow.
"""

import argparse
import codecs
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from byte_text import ngram_bits, read_bytes
from transformer import GroupQueryAttention, MultiHeadAttention, MultiQueryAttention
from transformer.blocks import BlockStack, DecoderBlock, GatedFeedForward, RMSNorm
from transformer.positions import RotaryEmbedding

# The model: its shapes are written with the letters of the library, B rows, L tokens, E = WIDTH.
WIDTH, HEADS, LAYERS, HIDDEN = 128, 4, 4, 256

# Bytes of one training step: many small steps learn more in the same time than a few large ones.
STEP = 2048

# Bytes that (c) reads at a time; any number gives the same answers.
CHUNK = 512


# --- The model --------------------------------------------------------------------------------------------------


def make_attention(kind: str, groups: int, window: int, rotary: RotaryEmbedding) -> nn.Module:
    """One of the three modules. They are interchangeable, and differ only in how many key/value heads they keep."""
    options = {"apply_causal_mask": True, "position": rotary, "window_size": window, "bias": False}
    if kind == "mha":
        return MultiHeadAttention(WIDTH, HEADS, **options)
    if kind == "mqa":
        return MultiQueryAttention(WIDTH, HEADS, **options)
    return GroupQueryAttention(WIDTH, HEADS, groups, **options)


class ByteDecoder(nn.Module):
    """A stack of blocks between an embedding of the 256 bytes and the same embedding, read backwards."""

    def __init__(self, kind: str, groups: int, window: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.05)  # small, as it also makes the logits
        rotary = RotaryEmbedding(WIDTH // HEADS)  # positions have no state: all layers may share them
        attentions = [make_attention(kind, groups, window, rotary) for _ in range(LAYERS)]
        blocks = [DecoderBlock(attention, GatedFeedForward(WIDTH, HIDDEN), RMSNorm) for attention in attentions]
        self.stack = BlockStack(blocks, RMSNorm(WIDTH))

    def forward(self, tokens: Tensor, expanding_context: bool | None = None) -> Tensor:
        """Tokens `[B, L]` to states `[B, L, E]`; the caches, not the caller, know which tokens came before."""
        return self.stack(self.embedding(tokens), expanding_context=expanding_context)

    def logits(self, states: Tensor) -> Tensor:
        """States `[..., E]` to the logits of the byte that comes next, `[..., 256]`."""
        return F.linear(states, self.embedding.weight)

    def start_afresh(self, use_kv_cache: bool) -> None:
        """Forget whatever was read, and from here on remember, or do not."""
        for block in self.stack.blocks:
            block.attention.kv_cache = None
            block.attention.use_kv_cache = use_kv_cache

    def cache_bytes(self, what: str = "nbytes") -> int:
        """The caches of all layers together: `nbytes` as allocated, `nbytes_used` by the tokens that they hold."""
        return sum(getattr(block.attention.kv_cache, what) for block in self.stack.blocks)


# --- Training ---------------------------------------------------------------------------------------------------


def train(model: ByteDecoder, text: Tensor, length: int, seconds: float) -> None:
    """Learn for so long to say what comes next, from rows of `length` bytes; the caches are off."""
    matrices = [weight for weight in model.stack.blocks.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim == 1] + [model.embedding.weight]
    # Muon learns from each step several times what AdamW does, and there is time for a few hundred steps only.
    optimizers = [
        torch.optim.Muon(matrices, lr=0.04, weight_decay=0.1),
        torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    bar = tqdm(total=seconds, desc="training", bar_format="{desc}: {bar} {n:.0f} of {total:.0f} s{postfix}")
    start, smooth = time.perf_counter(), 8.0
    # The rate rises for a moment and then falls to nothing, by the clock: a slow machine too gets all of the schedule.
    while (share := (time.perf_counter() - start) / seconds) < 1:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, 0.1 + share / 0.03) * (1 - share)
        starts = torch.randint(len(text) - length, (max(1, STEP // length), 1))
        rows = text[starts + torch.arange(length + 1)]
        logits = model.logits(model(rows[:, :-1]))
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        smooth += 0.05 * (loss.item() / math.log(2) - smooth)
        bar.set_postfix_str(f"{smooth:.2f} bits per byte", refresh=False)
        bar.update(min(seconds, time.perf_counter() - start) - bar.n)
    bar.close()


# --- What the cache is for --------------------------------------------------------------------------------------


@torch.inference_mode()
def continuation(
    model: ByteDecoder, prompt: Tensor, count: int, temperature: float, seed: int, use_kv_cache: bool
) -> Iterator[tuple[int, float]]:
    """The `count` tokens after a prompt `[1, L]`, one by one, each with the seconds that it took."""
    model.start_afresh(use_kv_cache)
    dice = torch.Generator().manual_seed(seed)
    text = unread = prompt
    for _ in range(count):
        start = time.perf_counter()
        # With a cache the model reads what it has not read yet: one byte. Without one it reads all of the text again.
        states = model(unread if use_kv_cache else text)
        # The largest of logits with this (Gumbel) noise is a draw from their softmax; without noise, the likeliest.
        noise = -torch.empty(1, 256).exponential_(generator=dice).log()
        token = (model.logits(states[:, -1]) + temperature * noise).argmax(dim=-1, keepdim=True)
        yield token.item(), time.perf_counter() - start
        text, unread = torch.cat([text, token], dim=1), token


def show_continuation(
    model: ByteDecoder, prompt: Tensor, count: int, temperature: float, seed: int
) -> tuple[Tensor, list[float], list[float]]:
    """(a) The same tokens with the cache and without: the whole text `[1, L]`, and both ways' seconds per token."""
    print(f"\n(a) {count:,} tokens after a prompt of {prompt.shape[1]}\n")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(decoder.decode(bytes(prompt[0].tolist())), end="", flush=True)
    tokens, with_cache = [], []
    for token, seconds in continuation(model, prompt, count, temperature, seed, use_kv_cache=True):
        print(decoder.decode(bytes([token])), end="", flush=True)
        tokens.append(token)
        with_cache.append(seconds)
    print("\n")
    once_more = continuation(model, prompt, count, temperature, seed, use_kv_cache=False)
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
        model = ByteDecoder(kind, groups, window)  # untrained: the bytes are the same
        sizes = []
        for expanding in (True, False):
            model.start_afresh(use_kv_cache=True)
            model(text, expanding_context=expanding)
            sizes.append(model.cache_bytes("nbytes_used"))
        print(f"    {f'{kind.upper()}, {heads} key/value heads':24}{sizes[0]:12,}{sizes[1]:16,}")


@torch.inference_mode()
def show_long_text(model: ByteDecoder, text: Tensor, cut: int, window: int) -> None:
    """(c) All of the held-out text through the sliding window, each byte judged by what the model read before it."""
    count = len(text) - cut
    print(f"\n(c) {count:,} held-out bytes in chunks of {CHUNK}, through a window of {window}\n")
    model.start_afresh(use_kv_cache=True)
    nats, sizes, start = 0.0, set(), time.perf_counter()
    chunks = zip(text[cut - 1 : -1].split(CHUNK), text[cut:].split(CHUNK), strict=True)
    for chunk, next_bytes in tqdm(chunks, desc="reading", total=math.ceil(count / CHUNK), leave=False):
        states = model(chunk[None], expanding_context=False)
        nats += F.cross_entropy(model.logits(states[0]), next_bytes, reduction="sum").item()
        sizes.add(model.cache_bytes())
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
    parser.add_argument("--seconds", type=float, default=90.0, help="time to train (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    text, cut = read_bytes(options.text)
    length = max(128, options.window)  # so that training meets every distance there is
    if cut <= length:
        parser.error(f"--text: expected more than {length * 20 // 19:,} bytes, got {len(text):,}")
    if not options.prompt or options.tokens < 1:
        parser.error("--prompt, --tokens: expected at least one byte of each")
    prompt = torch.tensor([list(options.prompt.encode())])

    model = ByteDecoder(options.attention, options.groups, options.window)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{type(model.stack.blocks[0].attention).__name__} in {LAYERS} layers, {parameters:,} parameters;", end=" ")
    print(f"{cut:,} bytes to learn, {len(text) - cut:,} held out", flush=True)
    train(model, text[:cut], length, options.seconds)
    model.eval()
    written, with_cache, without = show_continuation(model, prompt, options.tokens, options.temperature, options.seed)
    show_cache_sizes(written, options.groups, options.window)
    show_long_text(model, text, cut, options.window)
    if options.plot:
        plot_times(options.plot, prompt.shape[1], with_cache, without)


if __name__ == "__main__":
    main()
