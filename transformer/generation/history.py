"""Tokens of each row so far, for processors that must know where a row and its new tokens begin."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache import on_device

PADDING = -1
"""Id that `History.marked` has at padding: that of no token."""


@dataclass(frozen=True, slots=True)
class History:
    """Tokens of each row so far: its prompt of this call, and its new tokens.

    Args:
        tokens: int64 [B, n]. At padding, which is on the left, and after the end of a row it has the first token of
            the row.
        lengths: tokens of each row, without padding; None: all.
        new: new tokens of each row, which are the last; None: all.
        live: for each row, whether it gets a token now; None: all rows do. The scores of other rows are not used.
        numbers: the number of each row in the generation, the same for the beams of a row; None: its place.
    """

    tokens: Tensor
    lengths: Sequence[int] | None = None
    new: Sequence[int] | None = None
    live: Sequence[bool] | None = None
    numbers: Sequence[int] | None = None

    def marked(self) -> Tensor:
        """The tokens, int64 [B, n], with `PADDING` at padding."""
        if self.lengths is None or all(length == self.tokens.shape[1] for length in self.lengths):
            return self.tokens
        return self.tokens.masked_fill(~self._last(self.lengths), PADDING)

    def is_new(self) -> Tensor:
        """bool [B, n], true for tokens that were generated."""
        return self._last([self.tokens.shape[1]] * self.tokens.shape[0] if self.new is None else self.new)

    def row_tokens(self) -> dict[int, list[int]]:
        """The ids of each live row, prompt and new tokens, by its place; the host waits for them."""
        return self._on_host(self.lengths)

    def new_tokens(self) -> dict[int, list[int]]:
        """The new ids of each live row, by its place; the host waits for them."""
        return self._on_host(self.new)

    def number(self, row: int) -> int:
        """The number of a row in the generation."""
        return row if self.numbers is None else self.numbers[row]

    def rows(self, rows: Sequence[int], index: Tensor) -> "History":
        """The history of these rows, in this order. `index`: the same on the device of the tokens."""
        return History(
            self.tokens[index],
            self.lengths and [self.lengths[row] for row in rows],
            self.new and [self.new[row] for row in rows],
            self.live and [self.live[row] for row in rows],
            [self.number(row) for row in rows],
        )

    def _last(self, counts: Sequence[int]) -> Tensor:
        """bool [B, n], true for so many of the last columns of each row."""
        length, device = self.tokens.shape[1], self.tokens.device
        first = on_device([length - count for count in counts], device)
        return torch.arange(length, device=device) >= first.unsqueeze(-1)

    def _on_host(self, counts: Sequence[int] | None) -> dict[int, list[int]]:
        length = self.tokens.shape[1]
        return {
            row: tokens if counts is None else tokens[length - counts[row] :]
            for row, tokens in enumerate(self.tokens.tolist())
            if self.live is None or self.live[row]
        }


class HistoryProcessor(ABC):
    """Interface of a processor that must know where a row and its new tokens begin, or which rows go on.

    It is called by `process`. Called as `processor(input_ids, scores)`, as other libraries do, it takes all ids for
    new tokens of their row.
    """

    __slots__ = ()

    @abstractmethod
    def process(self, history: History, scores: Tensor) -> Tensor:
        """The scores [B, V] of the next token, from the tokens of each row and from scores [B, V]."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As `process`, of rows without padding in which all tokens are new."""
        return self.process(History(input_ids), scores)
