"""Decode step with a cache, compared with a forward of the whole sequence."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from .case import Candidate, Case, Setup
from .grid import Grid
from .layers import cached_layer, layer, read_by
from .limits import reading
from .peers import WHOLE, LlamaWhole

CACHED, RECOMPUTING = "One new token", "Recomputing all tokens"
EMBED_DIM, NUM_HEADS = 512, 8


def cases(grid: Grid) -> Iterator[Case]:
    """All lengths: the gain of the cache, and recomputing compared with another library."""
    grid = replace(grid, embed_dim=EMBED_DIM, num_heads=NUM_HEADS)
    for context in grid.contexts:
        yield Case(CACHED, {"context": context}, partial(cached, grid, context))
        yield Case(RECOMPUTING, {"context": context}, partial(recomputing, grid, context))


def cached(grid: Grid, context: int) -> Setup:
    """One step, and the same output without a cache."""
    place = grid.place()
    attention, sequence = layer(grid, place, NUM_HEADS, use_kv_cache=True), place.random(1, context, EMBED_DIM)
    uncached = layer(grid, place, NUM_HEADS)
    with torch.inference_mode():
        attention(sequence)
    return Setup(
        cached_layer(attention, sequence[:, -1:]),
        others={"ours, recomputing": Candidate(lambda: uncached(sequence)[:, -1])},
        limits=[reading(read_by(attention))],
    )


def recomputing(grid: Grid, context: int) -> Setup:
    """A forward of the whole sequence, in both libraries."""
    place = grid.place()
    attention, sequence = layer(grid, place, NUM_HEADS), place.random(1, context, EMBED_DIM)
    theirs = place.module(LlamaWhole(grid, NUM_HEADS))
    return Setup(Candidate(lambda: attention(sequence)[:, -1]), {WHOLE: Candidate(lambda: theirs(sequence)[:, -1])})
