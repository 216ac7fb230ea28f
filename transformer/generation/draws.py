"""Random numbers of sampled tokens, by the place of a token in its row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .choice import waiting_times
from .rows import Row


class Draws:
    """Random numbers of the tokens of rows, drawn in the order of plain decoding and kept until they are used.

    A token is a function of its scores and of these numbers. So an assistant that guesses with the same numbers agrees
    most often, and a token that is chosen again after a wrong guess is the one of plain decoding.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._columns: dict[int, Tensor] = {}
        self._first = self._drawn = 0
        self.are_needed = any(row.options.temperature for row in rows)
        """False if no row is sampled."""

    def times(self, places: Sequence[int], scores: Tensor) -> Tensor | None:
        """The waiting times [B, V] of the new token at such a place of each row; None if no row is sampled."""
        if not self.are_needed:
            return None
        while self._drawn <= max(*places, self._first):
            self._columns[self._drawn] = waiting_times(self._rows, scores)
            self._drawn += 1
        # Rows that ended before the first place get any numbers.
        places = [max(place, self._first) for place in places]
        if min(places) == max(places):
            return self._columns[places[0]]
        return torch.stack([self._columns[place][row] for row, place in enumerate(places)])

    def forget(self, before: int) -> None:
        """Frees the numbers of places before this one."""
        self._first = before
        for place in [each for each in self._columns if each < before]:
            del self._columns[place]
