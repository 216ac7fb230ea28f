"""Streaming through a window: time and memory of a step at increasing lengths."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from transformer import MultiHeadAttention
from transformer.positions import RotaryEmbedding

from .case import Candidate, Case, Setup
from .grid import Grid, Place
from .layers import read_by
from .limits import reading

KIND = "Streaming"
EMBED_DIM, NUM_HEADS = 512, 8
MARKS = 10
CHUNK = 4096
"""Tokens read at once on the way from mark to mark."""

AT_THE_START, RECOMPUTING = "a module at its start", "recomputing the window"


def cases(grid: Grid) -> Iterator[Case]:
    """Lengths at which single steps are timed."""
    for window, sinks, tokens in grid.streaming:
        stream = Stream(grid.place(), window, sinks)
        for mark in range(1, MARKS + 1):
            so_far = tokens * mark // MARKS
            point = {"window": window, "sinks": sinks, "tokens so far": so_far}
            yield Case(KIND, point, partial(stream.setup, so_far))


class Stream:
    """A module and its state, built for the first length."""

    def __init__(self, place: Place, window: int, sinks: int) -> None:
        self.place = place
        self.window = window
        self.sinks = sinks
        self.modules: list[MultiHeadAttention] = []

    def setup(self, tokens: int) -> Setup:
        """Reads tokens up to this length."""
        if not self.modules:
            self.modules = [self._module(True), self._module(True), self._module(False)]
        attention, fresh, uncached = self.modules
        whole = self.place.random(1, self.window + self.sinks, EMBED_DIM)
        x = whole[:, -1:]
        with torch.inference_mode():
            if fresh.kv_cache is None:
                fresh(whole)
            while (left := tokens - (0 if attention.kv_cache is None else attention.kv_cache.length)) > 0:
                attention(self.place.filled(1, min(left, CHUNK), EMBED_DIM))
        cache = attention.kv_cache
        details = {"held": cache.cached_length, "resident MB": resident(self.place.device) / 1e6}
        return Setup(
            Candidate(lambda: attention(x), held=cache.nbytes),
            others={
                AT_THE_START: Candidate(lambda: fresh(x), held=fresh.kv_cache.nbytes),
                RECOMPUTING: Candidate(lambda: last(uncached(whole))),
            },
            limits=[reading(read_by(attention))],
            details=lambda: details,
        )

    def _module(self, use_kv_cache: bool) -> MultiHeadAttention:
        rotary = RotaryEmbedding(EMBED_DIM // NUM_HEADS)
        return self.place.module(
            MultiHeadAttention(
                EMBED_DIM,
                NUM_HEADS,
                True,
                use_kv_cache,
                bias=False,
                position=rotary,
                window_size=self.window,
                num_sinks=self.sinks,
            )
        )


def last(out: Tensor) -> Tensor:
    """The output of the newest token."""
    return out[:, -1]


def resident(device: str) -> int:
    """Bytes of memory of the process, or of its tensors on a GPU."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
