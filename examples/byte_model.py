"""The byte-level model that several examples use: its blocks, its training, and its file."""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from byte_text import read_bytes
from transformer import GroupQueryAttention, MultiHeadAttention, MultiQueryAttention
from transformer.blocks import BlockStack, DecoderBlock, GatedFeedForward, RMSNorm
from transformer.positions import RotaryEmbedding

# The model: its shapes are written with the letters of the library, B rows, L tokens, E = WIDTH.
WIDTH, HEADS, LAYERS, HIDDEN = 128, 4, 4, 256

# Bytes of one training step: many small steps learn more in the same time than a few large ones.
STEP = 2048


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
        self.options = {"kind": kind, "groups": groups, "window": window}
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


def train(model: ByteDecoder, text: Tensor, length: int, seconds: float, rate: float = 1.0) -> None:
    """Learn for so long to say what comes next, from rows of `length` bytes; the caches are off.

    A `rate` below 1 is for what has learnt before: large steps would first undo that.
    """
    matrices = [weight for weight in model.stack.blocks.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim == 1] + [model.embedding.weight]
    # Muon learns from each step several times what AdamW does, and there is time for a few hundred steps only.
    optimizers = [
        torch.optim.Muon(matrices, lr=0.04, weight_decay=0.1),
        torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [rate * group["lr"] for group in groups]
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


# --- Writing ----------------------------------------------------------------------------------------------------


def draw(logits: Tensor, temperature: float, dice: torch.Generator) -> Tensor:
    """One byte of each row, `[B, 1]`, drawn from the softmax of its logits `[B, 256]` over the temperature."""
    # The largest of logits with this (Gumbel) noise is a draw from their softmax; without noise, the likeliest.
    noise = -torch.empty(logits.shape).exponential_(generator=dice).log()
    return (logits + temperature * noise).argmax(dim=-1, keepdim=True)


# --- Its file ---------------------------------------------------------------------------------------------------


def save(model: ByteDecoder, path: Path) -> None:
    """The weights, and beside them the options that build the model."""
    save_file(model.state_dict(), path, metadata={name: str(value) for name, value in model.options.items()})


def load(path: Path) -> ByteDecoder:
    """The model that `save` wrote; the program ends where the file is none."""
    try:
        with safe_open(path, framework="pt") as file:
            options = file.metadata()
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)
        model = ByteDecoder(options["kind"], int(options["groups"]), int(options["window"]))
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise SystemExit(f"{path}: expected a model that language_model.py --save wrote ({error})") from error
    model.load_state_dict(weights)
    return model


def load_or_train(path: Path | None, window: int, seconds: float) -> ByteDecoder:
    """The model in a file, or a new one that has learnt Python's own reference for so long; its caches are on.

    In double precision, so that examples may compare what was written token by token: read in pieces or at once, the
    logits differ by rounding alone, and in single precision that can decide between two bytes about as likely.
    """
    if path:
        model = load(path)
    else:
        model = ByteDecoder("gqa", groups=2, window=window)
        text, cut = read_bytes(None)
        train(model, text[:cut], max(128, window), seconds)
    model.start_afresh(use_kv_cache=True)
    return model.double().eval()
