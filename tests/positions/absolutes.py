"""Helpers for absolute positions: embeddings in plain Python, modules, and steps of any kind."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.setups import fill
from transformer import MultiHeadAttention, Step
from transformer.cache import Lengths
from transformer.masks import Rule
from transformer.positions import AbsolutePositions, LearnedPositions, SinusoidalPositions

WIDTH = 6

MODULES = {
    "learned": lambda: learned(),
    "learned, two rows before": lambda: learned(offset=2),
    "sinusoidal": lambda: SinusoidalPositions(WIDTH),
    "sinusoidal, halves": lambda: SinusoidalPositions(WIDTH, interleaved=False),
}
"""Makers of one module of each kind."""


def sinusoid(position: int, width: int, base: float = 10000.0) -> list[float]:
    """One position's embedding, dimension by dimension."""
    angles = [position / base ** ((i - i % 2) / width) for i in range(width)]
    return [math.cos(angle) if i % 2 else math.sin(angle) for i, angle in enumerate(angles)]


def learned(seed: int = 0, max_length: int = 40, offset: int = 0) -> LearnedPositions:
    module = LearnedPositions(max_length, WIDTH, offset)
    fill(module, seed)
    return module.double()


def of(module: AbsolutePositions, position: int) -> list[float]:
    """The embedding that the module should add at a position."""
    if isinstance(module, LearnedPositions):
        before = len(module.embedding.weight) - module.max_length
        return module.embedding.weight[before + position].tolist()
    both = sinusoid(position, WIDTH, module.base)
    return both if module.interleaved else both[::2] + both[1::2]


def expected(module: AbsolutePositions, x: Tensor, real: list[list[bool]]) -> Tensor:
    """Token by token, counting the real ones of each row."""
    total = x.clone().double()
    for b, row in enumerate(real):
        position = 0
        for column, is_real in enumerate(row):
            if is_real:
                total[b, column] += torch.tensor(of(module, position), dtype=torch.float64)
                position += 1
    return total


def attention(**options: object) -> MultiHeadAttention:
    module = MultiHeadAttention(WIDTH, 2, True, True, **options)
    fill(module, 1)
    return module.double()


def step_of(before: tuple[int, ...], x: Tensor, real: Tensor | None = None, new_lengths: tuple[int, ...] = ()) -> Step:
    """A step in the middle of a conversation, without the conversation."""
    new = Lengths(new_lengths or (x.shape[1],))
    return Step(Rule(True), x.shape[0], x.shape[1], Lengths(before), new, x.device, real)
