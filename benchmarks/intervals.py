"""Medians with a 95 % interval by order statistics: nothing is assumed about how times are spread."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A median, and where the true one lies with 95 % confidence."""

    median: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Interval":
        """In another unit."""
        return Interval(self.median * factor, self.low * factor, self.high * factor)


def interval(values: Sequence[float]) -> Interval:
    """Of at least one value; of fewer than six the whole range, which then is as much as can be said."""
    ordered = sorted(values)
    rank = _rank(len(ordered))
    return Interval(statistics.median(ordered), ordered[rank], ordered[-1 - rank])


def _rank(count: int) -> int:
    """How many values may be cut off at each end: the median lies beyond them as often as a coin falls so."""
    below, cut = 0.0, 0
    for successes in range(count // 2):
        below += math.comb(count, successes) / 2**count
        if 2 * below > 1 - CONFIDENCE:
            break
        cut = successes
    return cut
