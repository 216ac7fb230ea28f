"""Decode step of rows that share a prompt, beside the same rows with the prompt apart, as it was copied before."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from transformer.kernels import tuned

from .case import Case, Setup
from .chunks import flops
from .grid import Grid
from .layers import cached_layer, holding
from .limits import arithmetic, reading

KIND = "One decode step after a shared prompt"
APART = "ours, rows apart"
BYTES, ERROR = "bytes beside those of rows apart", "largest difference to rows apart"

COPIED = 1 << 40
"""Bytes that no selection saves: rows are copied."""


def cases(grid: Grid) -> Iterator[Case]:
    """Every dtype, prompt and number of key/value heads."""
    for dtype, (rows, tokens), groups in product(grid.dtypes, grid.shared, grid.groups):
        point = {"dtype": dtype, "rows": rows, "shared": tokens, "G": groups}
        weight = 0.8 + rows * tokens * groups / (1 << 21)
        yield Case(KIND, point, partial(setup, grid, dtype, rows, tokens, groups), weight)


def setup(grid: Grid, dtype: str, rows: int, tokens: int, groups: int) -> Setup:
    """One new token of each row; all have read the same prompt."""
    place = grid.place(dtype)
    attention, x = holding(grid, place, groups, 1, tokens), place.random(rows, 1, grid.embed_dim)
    apart = holding(grid, place, groups, 1, tokens)
    apart.load_state_dict(attention.state_dict())
    apart.kv_cache = attention.kv_cache.fork()
    with torch.inference_mode():
        with tuned(min_shared_bytes=COPIED):
            apart.kv_cache.select([0] * rows)
        with tuned(min_shared_bytes=0):
            attention.kv_cache.select([0] * rows)
        difference = (attention(x) - apart(x)).abs().max() / apart(x).abs().max()
        for each in (attention, apart):
            each.kv_cache.truncate(tokens)
    details = {BYTES: attention.kv_cache.nbytes / apart.kv_cache.nbytes, ERROR: float(difference)}
    prompt = [tensor[:1] for tensor in apart.kv_cache.values()]
    weights = [parameter.detach() for parameter in attention.parameters()]
    return Setup(
        cached_layer(attention, x),
        others={APART: cached_layer(apart, x)},
        limits=[
            reading([*prompt, *weights]),
            arithmetic(flops(grid, groups, rows, rows * (tokens + 1)), place),
        ],
        details=lambda: details,
    )
