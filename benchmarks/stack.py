"""One decode step of a whole stack of blocks against the sum of its parts: what holds them together costs nothing."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import trange

from transformer import GroupQueryAttention
from transformer.blocks import BlockStack, DecoderBlock, GatedFeedForward, RMSNorm
from transformer.positions import RotaryEmbedding

from .timing import microseconds, print_table

EMBED_DIM, NUM_HEADS, NUM_GROUPS, HIDDEN_DIM, NUM_LAYERS, WINDOW = 576, 9, 3, 1536, 12, 256


def stack_of(pattern: str, prompt: Tensor) -> BlockStack:
    """A stack of twelve blocks that has read `prompt` [B, L, E]."""
    rotary = RotaryEmbedding(EMBED_DIM // NUM_HEADS)

    def block(window_size: int | None) -> DecoderBlock:
        attention = GroupQueryAttention(
            EMBED_DIM, NUM_HEADS, NUM_GROUPS, True, True, bias=False, position=rotary, window_size=window_size
        )
        return DecoderBlock(attention, GatedFeedForward(EMBED_DIM, HIDDEN_DIM), RMSNorm)

    makers = {"sliding": lambda: block(WINDOW), "full": lambda: block(None)}
    named = {name: makers[name] for name in pattern.split()}
    stack = BlockStack.from_pattern(pattern, NUM_LAYERS, RMSNorm(EMBED_DIM), **named).eval()
    stack(prompt)
    return stack


def parts_of(stack: BlockStack, x: Tensor) -> dict[str, float]:
    """Seconds that each sort of part takes when a step is walked through by hand, in the stack's own order.

    In that order the weights come from memory, as in the stack; each attention module works out its own step.
    """
    seconds: dict[str, float] = defaultdict(float)

    def timed(part: str, run: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        began = time.perf_counter()
        out = run(*arguments)
        seconds[part] += time.perf_counter() - began
        return out

    for block in stack.blocks:
        normed = timed("norms", block.attention_residual.norm_before, x)
        x = timed("sums", torch.add, x, timed("attention", block.attention, normed))
        normed = timed("norms", block.feed_forward_residual.norm_before, x)
        x = timed("sums", torch.add, x, timed("feed-forward", block.feed_forward, normed))
    timed("norms", stack.norm, x)
    return seconds


@torch.inference_mode()
def run(lengths: tuple[int, ...] = (128, 1024), rounds: int = 150) -> None:
    """Prints microseconds of the stack, of each sort of its parts, and the ratio of the stack to their sum."""
    body, sorts = [], ("attention", "feed-forward", "norms", "sums")
    for pattern in ("full", "sliding sliding full"):
        for cached in lengths:
            stack, x = stack_of(pattern, torch.randn(1, cached, EMBED_DIM)), torch.randn(1, 1, EMBED_DIM)
            whole, parts = [], []
            for turn in trange(rounds, desc=f"stack, {pattern!r}, {cached} cached", leave=False):
                began = time.perf_counter()
                stack(x)
                whole.append(time.perf_counter() - began)
                parts.append(parts_of(stack, x))
                if turn < rounds // 10:  # warm-up
                    whole.clear(), parts.clear()
            own, sums = statistics.median(whole), statistics.median(sum(part.values()) for part in parts)
            each = [microseconds(statistics.median(part[sort] for part in parts)) for sort in sorts]
            body.append([pattern, f"{cached:,}", microseconds(own), *each, f"{own / sums:.3f}"])
    print_table(
        f"One decode step of {NUM_LAYERS} blocks, microseconds (E {EMBED_DIM}, H {NUM_HEADS}, G {NUM_GROUPS}, "
        f"hidden {HIDDEN_DIM}, W {WINDOW}, batch 1, float32)",
        ["pattern", "cached", "stack", *sorts, "stack / sum of parts"],
        body,
    )
