"""Modules that the tour is about, and how it compares. Everything is float64: equal means equal to 10 digits."""

from __future__ import annotations

import torch
from torch import Tensor

from transformer import GroupQueryAttention
from transformer.positions import RotaryEmbedding

E, H, G, D = 16, 4, 2, 4
"""Width, query heads, key/value heads, and the width of a head."""


def attention(cached: bool = True, **options: object) -> GroupQueryAttention:
    """A causal module with rotary positions; the same weights at every call."""
    torch.manual_seed(1)
    options = {"position": RotaryEmbedding(D), **options}
    return GroupQueryAttention(E, H, G, True, cached, dtype=torch.float64, **options)


def tokens(rows: int, length: int) -> Tensor:
    """Vectors [B, L, E]."""
    return torch.randn(rows, length, E, dtype=torch.float64)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
