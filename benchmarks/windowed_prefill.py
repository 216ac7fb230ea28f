"""Prefill over a short window: blocks of queries, compared with a mask of length by length."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from transformer import GroupQueryAttention
from transformer.attention.blockwise import BlockwiseAttention
from transformer.cache import uncached_view

from .case import Candidate, Case, Setup
from .chunks import flops
from .grid import Grid
from .layers import layer, sdpa
from .limits import arithmetic
from .peers import WHOLE, LlamaWhole

KERNEL, MODULE = "The kernel of a windowed prefill", "Windowed prefill"
MASKED = "SDPA, mask"

LONG = 4096
"""Tokens up to which the masked module is measured too; beyond, its mask makes it pointless."""


def cases(grid: Grid) -> Iterator[Case]:
    """Kernel and module at all windows and lengths."""
    for window, length in grid.windowed:
        point = {"window": window, "tokens": length}
        yield Case(KERNEL, point, partial(kernel, grid, window, length), 1 + length / 4096)
        yield Case(MODULE, point, partial(module, grid, window, length))


def kernel(grid: Grid, window: int, length: int) -> Setup:
    """Attention without projections, compared with SDPA and a mask."""
    place = grid.place()
    attention = layer(grid, place, grid.num_heads, window_size=window)
    query, key, value = (place.random(1, grid.num_heads, length, grid.head_dim) for _ in range(3))
    x, mask = place.random(1, length, grid.embed_dim), window_mask(window, length, grid.device)

    def ours() -> Tensor:
        step = attention.plan(x)
        return BlockwiseAttention(attention.kernel, step, uncached_view(key, value, step), query, query)()[0]

    return Setup(
        Candidate(ours),
        others={MASKED: Candidate(lambda: sdpa(query, key, value, mask, False))},
        limits=[arithmetic(4 * pairs(window, length) * grid.embed_dim, place)],
    )


def module(grid: Grid, window: int, length: int) -> Setup:
    """The whole layer, compared with transformers' layer and its sliding mask."""
    place = grid.place()
    attention, x = layer(grid, place, grid.num_heads, window_size=window), place.random(1, length, grid.embed_dim)
    peers, others = {}, {}
    if length <= LONG:
        mask = window_mask(window, length, grid.device)
        peers[WHOLE] = Candidate(partial(place.module(LlamaWhole(grid, grid.num_heads)), x, mask[None, None]))
        others[MASKED] = Candidate(partial(masked_module, attention, x, mask))
    count = pairs(window, length)
    limits = [arithmetic(flops(grid, grid.num_heads, length, count), place)]
    return Setup(Candidate(lambda: attention(x)), peers, others, limits)


def masked_module(attention: GroupQueryAttention, x: Tensor, mask: Tensor) -> Tensor:
    """The same projections around SDPA with its mask."""
    query, key, value = (
        projection(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return attention.out_proj(sdpa(query, key, value, mask, False).transpose(1, 2).flatten(2))


def window_mask(window: int, length: int, device: str) -> Tensor:
    """True where a query sees a key, [L, L]."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


def pairs(window: int, length: int) -> float:
    """The number of visible pairs of query and key."""
    width = min(window, length)
    return width * (width + 1) / 2 + (length - width) * width
