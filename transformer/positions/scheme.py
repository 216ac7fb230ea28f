"""The two interfaces of a position scheme: what turns queries and keys, and what adds to their scores."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

Positions = range | Tensor
"""Positions of the tokens of one call: a range where all rows stand alike, else int64 [B, L]."""


class RotaryTable(NamedTuple):
    """Cosines and signed sines of the angles at some positions, [L, rotary_dim] or [B, 1, L, rotary_dim]."""

    cos: Tensor
    sin: Tensor


class Rotation(nn.Module, ABC):
    """A scheme that turns queries and keys by their own positions, so that products depend on the distance."""

    head_dim: int

    @abstractmethod
    def table(self, positions: Positions, like: Tensor) -> RotaryTable:
        """What `rotate` needs at these positions, on the device and in the working precision of `like`."""

    @abstractmethod
    def rotate(self, x: Tensor, table: RotaryTable) -> Tensor:
        """`x` [B, H, L, D] turned by the table's angles; same shape and dtype."""


class ScoreBias(nn.Module, ABC):
    """A scheme that adds to the scores of each head by the distance between query and key."""

    num_heads: int

    @abstractmethod
    def bias(self, distance: Tensor) -> Tensor:
        """`distance` int64 [..., L, S] (query position minus key position) to a bias [..., H, L, S]."""
