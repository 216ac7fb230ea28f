"""Inputs of a call of attention by positions instead of a mask: of keys and queries, of sinks, and distances."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class Positions(NamedTuple):
    """Positions of keys and queries, each number for all rows of the batch or one for each.

    Column 0 of a row has position `first`; its tokens are those at positions `start` to `end` (exclusive), and its
    first query is at `past`. A query sees the tokens of its row by the rule of `masks.py`, sinks aside.
    """

    first: Sequence[int]
    start: Sequence[int]
    end: Sequence[int]
    past: Sequence[int]
    causal: bool = True
    window: int | None = None

    def of_rows(self, count: int) -> Iterator[tuple[int, int, int, int]]:
        """The four numbers of each of `count` rows."""
        four = self.first, self.start, self.end, self.past
        spread = (numbers if len(numbers) == count else (numbers[0],) * count for numbers in four)
        return zip(*spread, strict=True)


class PositionedSinks(NamedTuple):
    """The first tokens of each row: a query sees those before its window and, with no window, before `start`.

    `query` [B, H, L, D], `key` and `value` [B, G, n, D], or records as those of the call; distances are taken from
    min(position, `max_distance`).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    max_distance: int


class DistanceBias(NamedTuple):
    """Numbers added to scores: by `slopes` float32 [H] times the size of the distance, or by a `table` float32 [H, T].

    Number i of the table belongs to the distance `first + i` (query position minus key position); distances beyond its
    ends take its first or its last number.
    """

    slopes: Tensor | None = None
    table: Tensor | None = None
    first: int = 0


class Positioned(NamedTuple):
    """All that a call says without a mask."""

    positions: Positions
    sinks: PositionedSinks | None = None
    bias: DistanceBias | None = None
