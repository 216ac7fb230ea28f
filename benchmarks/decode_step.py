"""One decode step of one layer over a cache that is full already."""

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
    """Every point that fits in memory."""
    for dtype, batch, cached, groups in product(grid.dtypes, grid.batches, grid.cached, grid.groups):
        if bytes_needed(grid, dtype, batch, cached, groups) <= grid.memory:
            point = {"dtype": dtype, "batch": batch, "cached": cached, "G": groups}
            weight = 1 + batch * cached / (1 << 18)  # the more there is to be put in place
            yield Case(KIND, point, partial(setup, grid, dtype, batch, cached, groups), weight)


def bytes_needed(grid: Grid, dtype: str, batch: int, cached: int, groups: int) -> int:
    """Of everybody together: four caches, and what peers make of theirs in a step.

    They put them together anew, x-transformers turns all keys in four tensors of float32, and SDPA may repeat keys and
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
