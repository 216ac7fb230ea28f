"""Prefill of one layer without a cache."""

from collections.abc import Iterator
from functools import partial
from itertools import product

from .case import Candidate, Case, Setup
from .chunks import flops
from .grid import Grid
from .layers import SDPA, bare, layer
from .limits import arithmetic
from .peers import TORCH, WHOLE, X_TRANSFORMERS, LlamaWhole, TorchWhole, XTransformersWhole

KIND = "Prefill"

LONG = 8192
"""Tokens beyond which one number of groups is enough: attention, which all of them share, is then nearly everything."""


def cases(grid: Grid) -> Iterator[Case]:
    """All lengths."""
    for length, groups in product(grid.prefill, grid.prefill_groups):
        if length <= LONG or groups == grid.prefill_groups[0]:
            yield Case(KIND, {"tokens": length, "G": groups}, partial(setup, grid, length, groups), 1 + length / 2048)


def setup(grid: Grid, length: int, groups: int) -> Setup:
    """A prompt of one row."""
    place = grid.place()
    attention, x = layer(grid, place, groups), place.random(1, length, grid.embed_dim)
    peers = {WHOLE: LlamaWhole(grid, groups), X_TRANSFORMERS: XTransformersWhole(grid, groups)}
    if groups == grid.num_heads:
        peers[TORCH] = TorchWhole(grid, length)
    return Setup(
        Candidate(lambda: attention(x)),
        {name: Candidate(partial(place.module(module), x)) for name, module in peers.items()},
        {SDPA: bare(grid, place, attention, x)},
        [arithmetic(flops(grid, groups, length, length * (length + 1) / 2), place)],
    )
