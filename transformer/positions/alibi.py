"""Attention with linear biases (ALiBi, arXiv 2108.12409)."""

import math
from functools import partial

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .constant import Constant
from .scheme import ScoreBias


class ALiBi(ScoreBias):
    """Lowers each score by a slope of its head times the distance between query and key.

    Slopes are the paper's: for a power of two `H` heads `2 ** (-8 (i + 1) / H)`; else those of the next lower power of
    two, then every other slope of the next higher one. Keys ahead of the query (not causal) are lowered likewise.

    Raises ConfigurationError for `num_heads` below 1.
    """

    learned = False

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1:
            raise ConfigurationError(f"num_heads: expected at least 1, got {num_heads}")
        self.num_heads = num_heads
        self._slopes = Constant(partial(_slopes, num_heads))

    def bias(self, distance: Tensor) -> Tensor:
        """`distance` int64 [..., L, S] to a float32 bias [..., H, L, S]."""
        return distance.abs().unsqueeze(-3) * -self._slopes.beside(distance)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def _slopes(num_heads: int) -> Tensor:
    """float32 [H, 1, 1] on the CPU."""
    lower = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / lower) for i in range(lower)]
    between = [2.0 ** (-8.0 * (i + 1) / (2 * lower)) for i in range(0, 2 * lower, 2)]
    slopes += between[: num_heads - lower]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu").view(-1, 1, 1)
