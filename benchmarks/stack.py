"""Decode step of a stack of blocks, compared with the sum of its parts."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from transformer import GroupQueryAttention
from transformer.blocks import BlockStack, DecoderBlock, GatedFeedForward, RMSNorm
from transformer.positions import RotaryEmbedding

from .case import Candidate, Case, Setup
from .grid import Grid
from .runner import Timer

KIND = "One decode step of a stack"
EMBED_DIM, NUM_HEADS, NUM_GROUPS, HIDDEN_DIM, WINDOW = 576, 9, 3, 1536, 256
PATTERNS = "full", "sliding sliding full"
BY_HAND = "its parts, walked through by hand"
WALKS = 20
"""Walks through the stack in which its parts are timed one by one."""


def cases(grid: Grid) -> Iterator[Case]:
    """A short and a longer context."""
    for pattern in PATTERNS:
        for cached in sorted({128, grid.held}):
            yield Case(KIND, {"pattern": pattern, "cached": cached}, partial(setup, grid, pattern, cached))


def setup(grid: Grid, pattern: str, cached: int) -> Setup:
    """The stack as a whole; the same parts in the same order, so that the weights come from memory in both."""
    place = grid.place()
    stack = place.module(stack_of(pattern, grid.stack_layers))
    x = place.random(1, 1, EMBED_DIM)
    with torch.inference_mode():
        stack(place.random(1, cached, EMBED_DIM))
    return Setup(
        Candidate(lambda: stack(x)),
        others={BY_HAND: Candidate(lambda: walk(stack, x, lambda _, part, *given: part(*given)))},
        details=lambda: parts_of(stack, x),
    )


def stack_of(pattern: str, num_layers: int) -> BlockStack:
    """A stack of blocks with caches."""
    rotary = RotaryEmbedding(EMBED_DIM // NUM_HEADS)

    def block(window_size: int | None) -> DecoderBlock:
        attention = GroupQueryAttention(
            EMBED_DIM, NUM_HEADS, NUM_GROUPS, True, True, bias=False, position=rotary, window_size=window_size
        )
        return DecoderBlock(attention, GatedFeedForward(EMBED_DIM, HIDDEN_DIM), RMSNorm)

    makers = {"sliding": lambda: block(WINDOW), "full": lambda: block(None)}
    named = {name: makers[name] for name in pattern.split()}
    return BlockStack.from_pattern(pattern, num_layers, RMSNorm(EMBED_DIM), **named)


def walk(stack: BlockStack, x: Tensor, call: Callable[..., Tensor]) -> Tensor:
    """A step part by part, each through `call(kind, part, *inputs)`; each attention module plans its own step."""
    for block in stack.blocks:
        normed = call("norms", block.attention_residual.norm_before, x)
        x = call("sums", torch.add, x, call("attention", block.attention, normed))
        normed = call("norms", block.feed_forward_residual.norm_before, x)
        x = call("sums", torch.add, x, call("feed-forward", block.feed_forward, normed))
    return call("norms", stack.norm, x)


def parts_of(stack: BlockStack, x: Tensor) -> dict[str, float]:
    """Median microseconds of each kind of part in a step."""
    seconds: dict[str, list[float]] = defaultdict(list)
    timer = Timer(x.device.type)

    def timed(kind: str, part: Callable[..., Tensor], *given: Tensor) -> Tensor:
        out: list[Tensor] = []
        seconds[kind][-1] += timer(lambda: out.append(part(*given)))
        return out[0]

    for _ in range(WALKS):
        for kind in ("attention", "feed-forward", "norms", "sums"):
            seconds[kind].append(0.0)
        walk(stack, x, timed)
    return {f"{kind}, microseconds": statistics.median(values) * 1e6 for kind, values in seconds.items()}
