"""Ragged batches: rows with caches of different lengths, compared with padded rows."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .case import Candidate, Case, Setup
from .grid import Grid
from .layers import cached_layer, holding, layer, read_by
from .limits import reading
from .peers import DYNAMIC, STATIC, WHOLE, X_TRANSFORMERS, LlamaWhole, XTransformersWhole, llama_dynamic, llama_static

DECODE, PREFILL = "One decode step, ragged", "Prefill, ragged"
ROWS = 8


def cases(grid: Grid) -> Iterator[Case]:
    """Eight rows, the shortest an eighth of the longest."""
    for groups in grid.prefill_groups:
        point = {"rows": ROWS, "longest": grid.ragged, "G": groups}
        yield Case(DECODE, point, partial(decode, grid, groups))
        yield Case(PREFILL, point, partial(prefill, grid, groups))


def decode(grid: Grid, groups: int) -> Setup:
    """One new token of each row; other libraries pad on the left and mask."""
    place = grid.place()
    attention, x = layer(grid, place, groups, use_kv_cache=True), place.random(ROWS, 1, grid.embed_dim)
    with torch.inference_mode():
        attention(place.filled(ROWS, grid.ragged, grid.embed_dim), attention_mask=real_tokens(grid))
    padded = holding(grid, place, groups, ROWS, grid.ragged)
    real = torch.nn.functional.pad(real_tokens(grid), (0, 1), value=True)
    shape = ROWS, groups, grid.ragged, grid.head_dim
    return Setup(
        cached_layer(attention, x),
        {DYNAMIC: llama_dynamic(grid, place, shape, 1, real), STATIC: llama_static(grid, place, shape, 1, real)},
        {"ours, every row as long as the longest": cached_layer(padded, x)},
        [reading(read_by(padded))],
    )


def prefill(grid: Grid, groups: int) -> Setup:
    """All prompts at once, without a cache."""
    place, real = grid.place(), real_tokens(grid)
    attention, x = layer(grid, place, groups), place.random(ROWS, grid.ragged, grid.embed_dim)
    causal = torch.ones(grid.ragged, grid.ragged, dtype=torch.bool, device=grid.device).tril()
    llama, other = place.module(LlamaWhole(grid, groups)), place.module(XTransformersWhole(grid, groups))
    return Setup(
        Candidate(lambda: attention(x, attention_mask=real)),
        {
            WHOLE: Candidate(partial(llama, x, causal & real[:, None, None])),
            X_TRANSFORMERS: Candidate(partial(other, x, real)),
        },
        {"ours, every row as long as the longest": Candidate(lambda: attention(x))},
    )


def real_tokens(grid: Grid) -> Tensor:
    """[B, L], padded on the left: an eighth of the longest row, two eighths, and so on."""
    lengths = torch.arange(1, ROWS + 1) * grid.ragged // ROWS
    return (torch.arange(grid.ragged) >= grid.ragged - lengths[:, None]).to(grid.device)
