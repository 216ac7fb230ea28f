"""Caches in fewer bits: their bytes, their errors, and the bits per byte that they cost a trained model.

    python examples/cache_bits.py --model FOLDER    # a model that language_model.py --save wrote; half a minute
    python examples/cache_bits.py                   # trains one first

(a) For each `cache_dtype` of the library: the bytes of the cache as a share of float32's; errors of keys, values and
outputs of each attention module, which gets the same input every time; and the bits per byte of the held-out text, all
of which is read through the cache, in chunks.

(b) For keys in 8 and in 4 bits: which numbers should share a scale? The library gives each token its own, so a key is
rounded when it comes in and never again. KIVI (arXiv 2402.02750) gives each channel of a group of tokens one, and must
wait until the group is full: a key would be read unrounded at first and rounded later, and a result would depend on how
the text was cut into calls. Both are computed here with plain PyTorch, on keys and queries of the trained model.
"""

import argparse
import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from byte_model import CHUNK, HEADS, WIDTH, bits_per_byte, load, new_model, train
from byte_text import read_bytes
from transformer import DecoderOnlyTransformer
from transformer.attention import Attention
from transformer.codecs import CacheDtypes
from transformer.extras import require
from transformer.positions import RotaryEmbedding, RotaryTable

PLAIN_KINDS: tuple[CacheDtypes, ...] = (None, "float16", "bfloat16", "float8_e4m3fn", "int8", "int4")
KINDS = (*PLAIN_KINDS, ("int8", "int4"), ("int4", "int8"))

WINDOW = 128

# Bytes of a row that is read without a cache: a multiple of every group.
LONG_ROW = 640

# Rows of the held-out text on which errors are measured, as long as the window; a call of them reads PART tokens.
ROWS, PART = 32, 32


# --- What an attention module reads -------------------------------------------------------------------------------


@torch.inference_mode()
def attention_inputs(model: DecoderOnlyTransformer, rows: Tensor) -> list[tuple[Attention, Tensor]]:
    """Each attention module of the model, with its input [B, L, E] where the model reads `rows` [B, L]."""
    found = []
    hooks = [
        block.attention.register_forward_pre_hook(lambda module, given: found.append((module, given[0])))
        for block in model.decoder_blocks()
    ]
    model.disable_cache()(rows)
    for hook in hooks:
        hook.remove()
    return found


@torch.inference_mode()
def read(attention: Attention, x: Tensor, stored: CacheDtypes) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values, as they are read from the cache, and outputs of a module that reads `x` in parts."""
    attention.kv_cache, attention.cache_dtype, attention.use_kv_cache = None, stored, True
    out = torch.cat([attention(part, expanding_context=True) for part in x.split(PART, dim=1)], dim=1)
    key, value = attention.kv_cache.values()
    attention.kv_cache, attention.cache_dtype, attention.use_kv_cache = None, None, False
    return key, value, out


def error(actual: Tensor, expected: Tensor) -> Tensor:
    """The mean and the largest difference, as shares of the mean size of the expected numbers."""
    difference = (actual - expected).abs()
    return torch.stack((difference.mean(), difference.max())) / expected.abs().mean()


def errors_of(layers: list[tuple[Tensor, ...]], truths: list[tuple[Tensor, ...]]) -> Tensor:
    """The mean over the layers of each tensor's mean error, and the largest of its largest, by turns."""
    pairs = (zip(*layer, strict=True) for layer in zip(layers, truths, strict=True))
    errors = torch.stack([torch.stack([error(*pair) for pair in layer]) for layer in pairs])
    return torch.stack((errors[..., 0].mean(0), errors[..., 1].amax(0)), -1).flatten()


# --- (a) Each kind of cache ---------------------------------------------------------------------------------------


def show_kinds(model: DecoderOnlyTransformer, text: Tensor, cut: int) -> dict[str, float]:
    """Prints the table, and gives the bits per byte that each kind costs beside the full precision."""
    inputs = attention_inputs(model, held_out_rows(text, cut))
    truths = [read(attention, x, None) for attention, x in inputs]
    head_dim = inputs[0][0].head_dim
    print(f"\n(a) {len(text) - cut:,} held-out bytes in chunks of {CHUNK}, head_dim {head_dim}. Errors: mean and")
    print("    largest difference, as shares of the mean size of the numbers\n")
    print(f"    {'':14}{'share of':>9}{'keys':^18}{'values':^18}{'outputs':^18}{'bits per':>10}")
    print(f"    {'cache_dtype':14}{'bytes':>9}" + f"{'mean':>9}{'largest':>9}" * 3 + f"{'byte':>10}{'more':>10}")
    full_bits, full_bytes, more = 0.0, 0, {}
    for stored in KINDS:
        errors = errors_of([read(attention, x, stored) for attention, x in inputs], truths)
        bits, (size,) = bits_per_byte(model, text, cut, stored)
        if stored is None:
            full_bits, full_bytes = bits, size
        name = stored if isinstance(stored, str) else ", ".join(stored) if stored else "None: float32"
        more[name] = bits - full_bits
        shown = "".join(f"{number:9.4f}" for number in errors.tolist())
        print(f"    {name:14}{size / full_bytes:9.3f}{shown}{bits:10.4f}{more[name]:+10.4f}", flush=True)
    return more


# --- (b) Which numbers share a scale ------------------------------------------------------------------------------


def by_scale(groups: Tensor, bits: int) -> Tensor:
    """Groups [..., N] as they come back from integers of a few bits and one scale a group."""
    most = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True) / most
    return (groups / scale).round() * scale


def by_least_and_step(groups: Tensor, bits: int) -> Tensor:
    """The same with a least number and a step."""
    least, largest = groups.aminmax(dim=-1, keepdim=True)
    step = (largest - least) / (2**bits - 1)
    return least + ((groups - least) / step).round() * step


Rounding = Callable[[Tensor, int], Tensor]


def of_a_token(key: Tensor, bits: int, rounding: Rounding, channels: int) -> Tensor:
    """Keys [B, G, S, D], where `channels` of a token share a scale."""
    return rounding(key.unflatten(-1, (-1, channels)), bits).flatten(-2)


def of_a_channel(key: Tensor, bits: int, rounding: Rounding, tokens: int) -> Tensor:
    """Keys [B, G, S, D], where `tokens` of a channel share a scale."""
    return of_a_token(key.mT, bits, rounding, tokens).mT


def schemes(head_dim: int) -> Iterator[tuple[str, float, Callable[[Tensor, int], Tensor]]]:
    """Each way: its name, how many bits of scales a number costs with 16 bits for each, and the function."""
    for channels in sorted({head_dim, 32}, reverse=True):
        for name, rounding, headers in (("a scale", by_scale, 1), ("least, step", by_least_and_step, 2)):
            way = partial(of_a_token, rounding=rounding, channels=channels)
            yield f"{channels} channels of a token: {name}", headers * 16 / channels, way
    for tokens in (32, 64):
        way = partial(of_a_channel, rounding=by_least_and_step, tokens=tokens)
        yield f"{tokens} tokens of a channel: least, step", 32 / tokens, way


class RoundedKeys(RotaryEmbedding):
    """A rotation after which keys are rounded, all at once, for a model that reads without a cache."""

    def __init__(self, head_dim: int, rounded: Callable[[Tensor], Tensor]) -> None:
        super().__init__(head_dim)
        self.rounded = rounded

    def rotate_both(self, query: Tensor, key: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor]:
        query, key = super().rotate_both(query, key, table)
        return query, self.rounded(key)


def bits_of_rounded_keys(model: DecoderOnlyTransformer, rows: Tensor, rounded: Callable[[Tensor], Tensor]) -> float:
    """Bits per byte of rows [B, L + 1], read without a cache."""
    model = copy.deepcopy(model)
    for block in model.decoder_blocks():
        block.attention.position = RoundedKeys(block.attention.head_dim, rounded)
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item() / math.log(2)


@torch.inference_mode()
def show_scales(model: DecoderOnlyTransformer, text: Tensor, cut: int) -> None:
    """Prints, for each way to share a scale, the errors of keys, weights and outputs, and the bits that it costs."""
    layers = []
    for attention, x in attention_inputs(model, held_out_rows(text, cut)):
        query, key, value = attention.query_key_value(x)
        table = attention.position.table(range(x.shape[1]), key)
        layers.append((attention.position.rotate(query, table), attention.position.rotate(key, table), value))
    truths = [attend(*layer) for layer in layers]
    rows = text[cut:].unfold(0, LONG_ROW + 1, LONG_ROW + 1)
    full_bits = bits_of_rounded_keys(model, rows, lambda key: key)
    print(
        "\n(b) keys alone in 8 and 4 bits, by what shares a scale: mean errors of keys, attention weights and outputs;"
    )
    print(
        "    bits per byte with keys of 4 bits, without a cache. Scales: their bits for each number, at 16 bits each\n"
    )
    header = "".join(f"{name:>9}" for name in ("keys", "weights", "outputs"))
    print(f"    {'':41}{'scales':>7}{'8 bits':^27}{'4 bits':^27}{'bits per':>10}")
    print(f"    {'':48}{header * 2}{'byte more':>10}")
    for name, overhead, rounded in schemes(layers[0][0].shape[-1]):
        row = f"{overhead:7.2f}"
        for bits in (8, 4):
            found = [attend(query, rounded(key, bits), value) for query, key, value in layers]
            row += "".join(f"{mean:9.4f}" for mean in errors_of(found, truths)[::2])
        more = bits_of_rounded_keys(model, rows, partial(rounded, bits=4)) - full_bits
        print(f"    {name:41}{row}{more:+10.4f}", flush=True)


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, attention weights and outputs of plain causal attention."""
    keys, values = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    scores = query @ keys.mT / query.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return key, weights, weights @ values


def held_out_rows(text: Tensor, cut: int) -> Tensor:
    """Rows [B, WINDOW] spread over the held-out text."""
    rows = text[cut:].unfold(0, WINDOW, WINDOW)
    return rows[torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).long()]


def main() -> None:
    parser = argparse.ArgumentParser(description="What KV caches in fewer bits cost a trained model.")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a trained one (default: train one now)")
    parser.add_argument("--steps", type=int, default=500, help="training steps without --model (default: %(default)s)")
    parser.add_argument(
        "--heads", type=int, choices=[2, 4], default=HEADS, help=f"of {WIDTH} channels, without --model"
    )
    options = parser.parse_args()
    require("examples", *(["safetensors"] if options.model else ["tqdm"]))
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors this small gain little from more, and the result would depend on the number
    text, cut = read_bytes(None)
    if options.model:
        model = load(options.model)
    else:
        model = new_model("gqa", options.heads // 2, WINDOW, options.heads)
        train(model, text[:cut], WINDOW, options.steps)
    model.eval()
    more = show_kinds(model, text, cut)
    show_scales(model, text, cut)
    print(
        f"\nShown: beside a cache in float32, one in int8 costs {more['int8']:+.4f} bits per byte of held-out text, "
        f"one in int4 {more['int4']:+.4f}."
    )


if __name__ == "__main__":
    main()
