"""The three interfaces of a position scheme: it turns queries and keys, adds to their scores, or adds to the input."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Protocol

import torch
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
    learned: ClassVar[bool] = True
    """Whether what it adds may change between calls, so that it is worked out anew in each: with parameters, it may."""

    @abstractmethod
    def bias(self, distance: Tensor) -> Tensor:
        """`distance` int64 [..., L, S] (query position minus key position) to a bias [..., H, L, S]."""

    def bias_for(self, distance: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 (for schemes with constants)
        """The same bias, its constants as exact as scores of `dtype`, float32 or float64, need them."""
        return self.bias(distance)


class TokenPositions(Protocol):
    """What an absolute scheme needs to know of a call; `transformer.cache.Step` is one."""

    @property
    def batch(self) -> int:
        """B."""

    @property
    def tokens(self) -> int:
        """L as given, padding included."""

    @property
    def width(self) -> int:
        """The most real tokens that any row gains."""

    @property
    def device(self) -> torch.device:
        """Where `x` is."""

    @property
    def past_lengths(self) -> tuple[int, ...]:
        """How many tokens each row had seen; a single number where all rows are alike."""

    @property
    def total_lengths(self) -> tuple[int, ...]:
        """How many tokens each row has seen when the call is done, likewise."""

    @property
    def at(self) -> Tensor | None:
        """int64 [1 or B, L], below zero at padding: the positions, where only the device knows them and
        `past_lengths` and `total_lengths` say nothing."""

    @property
    def token_positions(self) -> Positions:
        """The position of each given column: a range where all rows are alike and none is padded, else int64 [B, L],
        below zero at padding."""


class AbsolutePositions(nn.Module, ABC):
    """A scheme that adds to each token of a model's input by the token's own position."""

    embed_dim: int

    @property
    def positions_limit(self) -> int | None:
        """Positions that there are; None: any number."""
        return None

    @abstractmethod
    def forward(self, x: Tensor, step: TokenPositions) -> Tensor:
        """`x` [B, L, E] with the embedding of each token's position added, and nothing at padding; same dtype."""
