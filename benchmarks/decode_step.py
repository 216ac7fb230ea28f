"""Decode step of one layer over a full cache."""

from collections.abc import Iterator
from functools import partial
from itertools import product

from .case import Case, Setup
from .chunks import flops
from .grid import DTYPES, Grid
from .layers import SDPA, bare, cached_layer, holding, read_by
from .limits import arithmetic, reading
from .peers import cached_peers

KIND = "One decode step"
SINGLE = "ours, float32"

X_TOKENS = 1 << 17
"""Cached tokens of all rows and heads up to which x-transformers takes part: it rotates all keys in each step, and took
8 to 80 times our time beyond (2 cores, 2026-11-25)."""


def cases(grid: Grid) -> Iterator[Case]:
    """All points that fit in memory."""
    for dtype, batch, cached, groups in product(grid.dtypes, grid.batches, grid.cached, grid.groups):
        if bytes_needed(grid, dtype, batch, cached, groups) <= grid.memory:
            point = {"dtype": dtype, "batch": batch, "cached": cached, "G": groups}
            weight = 1.1 + 2.4 * batch * cached * groups / (1 << 23)  # a larger cache takes longer to set up
            yield Case(KIND, point, partial(setup, grid, dtype, batch, cached, groups), weight)


def bytes_needed(grid: Grid, dtype: str, batch: int, cached: int, groups: int) -> int:
    """Bytes of all candidates together: their caches, and the copies that other libraries make in a step.

    They concatenate their caches, x-transformers rotates all keys in four float32 tensors, and SDPA may repeat keys and
    values for all heads. Beside 16 bits stands our float32.
    """
    numbers, size = batch * cached * grid.head_dim, DTYPES[dtype].itemsize
    with_x = x_takes_part(batch, cached, groups)
    caches = (10 if with_x else 8) * groups * size + (16 * groups if with_x else 0)
    repeated = 2 * grid.num_heads * size if groups < grid.num_heads else 0
    return numbers * (caches + repeated + (8 * groups if size < 4 else 0))


def x_takes_part(batch: int, cached: int, groups: int) -> bool:
    """True for points at which x-transformers is measured."""
    return batch * cached * groups <= X_TOKENS


def setup(grid: Grid, dtype: str, batch: int, cached: int, groups: int) -> Setup:
    """One new token of each row."""
    place = grid.place(dtype)
    attention, x = holding(grid, place, groups, batch, cached), place.random(batch, 1, grid.embed_dim)
    others = {}
    if grid.device == "cuda":
        others[SDPA] = bare(grid, place, attention, x, cached)
    elif dtype != "float32":
        single = grid.place("float32")
        others[SINGLE] = cached_layer(holding(grid, single, groups, batch, cached), x.float())
    return Setup(
        cached_layer(attention, x),
        cached_peers(grid, place, groups, batch, cached, with_x=x_takes_part(batch, cached, groups)),
        others,
        [reading(read_by(attention)), arithmetic(flops(grid, groups, batch, batch * (cached + 1)), place)],
    )
