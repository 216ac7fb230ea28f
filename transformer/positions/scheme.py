"""Interfaces of position schemes: rotation of queries and keys, bias of their scores, embedding of the input."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Positions = range | Tensor
"""Positions of the tokens of one call: a range if all rows have the same positions, else int64 [B, L]."""


class RotaryTable(NamedTuple):
    """Cosines and signed sines of the angles of positions, [L, rotary_dim] or [B, 1, L, rotary_dim]."""

    cos: Tensor
    sin: Tensor


class Rotation(nn.Module, ABC):
    """Scheme that rotates queries and keys by their own positions, so that their products depend on the distance."""

    head_dim: int

    @abstractmethod
    def table(self, positions: Positions, like: Tensor) -> RotaryTable:
        """The table that `rotate` needs for these positions, on the device and in the working precision of `like`."""

    @abstractmethod
    def rotate(self, x: Tensor, table: RotaryTable) -> Tensor:
        """`x` [B, H, L, D] rotated by the table's angles; same shape and dtype."""

    def rotate_both(self, query: Tensor, key: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor]:
        """Queries [B, H, L, D] and keys [B, G, L, D] of the same positions, rotated."""
        return self.rotate(query, table), self.rotate(key, table)


class ScoreBias(nn.Module, ABC):
    """Scheme that adds a bias to the scores of each head, computed from the distance between query and key."""

    num_heads: int
    learned: ClassVar[bool] = True
    """True if the bias can change between calls, as with parameters, and must be computed in each call."""

    @property
    def reach(self) -> tuple[int, int] | None:
        """Distances below and above which the bias stays as it is there; None where it may change at any distance."""
        return None

    @abstractmethod
    def bias(self, distance: Tensor) -> Tensor:
        """`distance` int64 [..., L, S] (query position minus key position) to a bias [..., H, L, S]."""

    def bias_for(self, distance: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 (for schemes with constants)
        """The same bias, with constants as exact as `dtype` (float32 or float64) allows."""
        return self.bias(distance)


class TokenPositions(Protocol):
    """Positions and lengths of a call, for an absolute scheme; `transformer.cache.Step` implements it."""

    @property
    def batch(self) -> int:
        """B, the rows of the batch."""

    @property
    def tokens(self) -> int:
        """L, the tokens of each row of the call, padding included."""

    @property
    def width(self) -> int:
        """The maximum number of new real tokens of a row."""

    @property
    def device(self) -> torch.device:
        """The device of `x`."""

    @property
    def past_lengths(self) -> tuple[int, ...]:
        """Tokens of each row before the call; a single number if all rows are equal."""

    @property
    def total_lengths(self) -> tuple[int, ...]:
        """Tokens of each row after the call; a single number if all rows are equal."""

    @property
    def at(self) -> Tensor | None:
        """Positions int64 [1 or B, L], below zero at padding, if only the device knows them; `past_lengths` and
        `total_lengths` are then meaningless. Else None."""

    @property
    def position_ids(self) -> Tensor | None:
        """Positions that the caller gave, int64 [B, L], below zero at padding: `token_positions` are these. Else None,
        and they are counted."""

    @property
    def has_gaps(self) -> bool:
        """True if the tokens, all of them real, are not one run of positions."""

    @property
    def host_positions(self) -> Positions:
        """Positions of the tokens, left-aligned, on the host where that knows them."""

    @property
    def token_positions(self) -> Positions:
        """Positions of the tokens of the call: a range if all rows are equal and have no padding, else int64 [B, L],
        below zero at padding."""


class AbsolutePositions(nn.Module, ABC):
    """Scheme that adds an embedding of its position to each token of a model's input."""

    embed_dim: int

    @property
    def positions_limit(self) -> int | None:
        """The number of positions; None if it is unlimited."""
        return None

    @abstractmethod
    def forward(self, x: Tensor, step: TokenPositions) -> Tensor:
        """`x` [B, L, E] with the embedding of each token's position added, and nothing at padding; same dtype."""
