"""Decode step of one layer over a full cache."""

from collections.abc import Iterator
from functools import partial
from itertools import product

from .case import Case, Setup
from .grid import DTYPES, Grid
from .layers import SDPA, bare, cached_layer, holding, read_by
from .limits import reading
from .peers import cached_peers

KIND = "One decode step"


def cases(grid: Grid) -> Iterator[Case]:
    """All points that fit in memory."""
    for dtype, batch, cached, groups in product(grid.dtypes, grid.batches, grid.cached, grid.groups):
        if bytes_needed(grid, dtype, batch, cached, groups) <= grid.memory:
            point = {"dtype": dtype, "batch": batch, "cached": cached, "G": groups}
            weight = 1 + batch * cached / (1 << 18)  # a larger cache takes longer to set up
            yield Case(KIND, point, partial(setup, grid, dtype, batch, cached, groups), weight)


def bytes_needed(grid: Grid, dtype: str, batch: int, cached: int, groups: int) -> int:
    """Bytes of all candidates together: four caches, and the copies that other libraries make in a step.

    They concatenate their caches, x-transformers rotates all keys in four float32 tensors, and SDPA may repeat keys and
    values for all heads.
    """
    numbers, size = batch * cached * grid.head_dim, DTYPES[dtype].itemsize
    return numbers * (10 * groups * size + 16 * groups + 2 * grid.num_heads * size)


def setup(grid: Grid, dtype: str, batch: int, cached: int, groups: int) -> Setup:
    """One new token of each row."""
    place = grid.place(dtype)
    attention, x = holding(grid, place, groups, batch, cached), place.random(batch, 1, grid.embed_dim)
    return Setup(
        cached_layer(attention, x),
        cached_peers(grid, place, groups, batch, cached),
        {SDPA: bare(grid, place, attention, x, cached)} if grid.device == "cuda" else {},
        reading(read_by(attention)),
    )
