"""Medians with a 95 % interval by order statistics, without an assumption about the distribution of times."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A median and its 95 % confidence interval."""

    median: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Interval":
        """The interval in another unit."""
        return Interval(self.median * factor, self.low * factor, self.high * factor)


def interval(values: Sequence[float]) -> Interval:
    """The interval of at least one value; for fewer than six values it is their whole range."""
    ordered = sorted(values)
    rank = _rank(len(ordered))
    return Interval(statistics.median(ordered), ordered[rank], ordered[-1 - rank])


def _rank(count: int) -> int:
    """The number of values outside of the interval at each end, by the binomial distribution."""
    below, cut = 0.0, 0
    for successes in range(count // 2):
        below += math.comb(count, successes) / 2**count
        if 2 * below > 1 - CONFIDENCE:
            break
        cut = successes
    return cut
