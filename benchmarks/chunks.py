"""Chunks of new tokens over a full cache: a turn of a conversation, or the check of drafted tokens."""

from collections.abc import Iterator
from functools import partial
from itertools import product

from .case import Case, Setup
from .grid import Grid
from .layers import SDPA, bare, cached_layer, holding, read_by
from .limits import arithmetic, reading
from .peers import cached_peers

KIND = "A chunk on a full cache"


def cases(grid: Grid) -> Iterator[Case]:
    """All lengths with all caches."""
    for cached, new, groups in product(grid.chunks_on, grid.chunks, grid.groups):
        yield Case(KIND, {"cached": cached, "new": new, "G": groups}, partial(setup, grid, cached, new, groups))


def setup(grid: Grid, cached: int, new: int, groups: int) -> Setup:
    """A chunk of one row."""
    place = grid.place()
    attention, x = holding(grid, place, groups, 1, cached), place.random(1, new, grid.embed_dim)
    return Setup(
        cached_layer(attention, x),
        cached_peers(grid, place, groups, 1, cached, new),
        {SDPA: bare(grid, place, attention, x, cached)},
        [
            reading(read_by(attention)),
            arithmetic(flops(grid, groups, new, new * (cached + (new + 1) / 2)), place),
        ],
    )


def flops(grid: Grid, groups: int, tokens: int, pairs: float) -> float:
    """Operations of the projections of `tokens` tokens and of `pairs` visible pairs of query and key."""
    head_dim, heads = grid.head_dim, grid.num_heads
    return 4 * tokens * grid.embed_dim * head_dim * (heads + groups) + 4 * pairs * head_dim * heads
