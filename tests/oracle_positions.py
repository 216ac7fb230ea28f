"""Position schemes in plain Python: one vector, one head or one distance at a time, in float64.

The second opinion that the position schemes and, through `oracle.py`, the attention modules are tested
against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Vector = list[float]


@dataclass(frozen=True)
class Rotary:
    """The first `rotary_dim` features of a head turn in pairs, pair `i` by `position * base ** (-2i /
    rotary_dim)`."""

    rotary_dim: int
    base: float = 10000.0
    interleaved: bool = False

    def rotate(self, vector: Vector, position: int) -> Vector:
        turned = list(vector)
        half = self.rotary_dim // 2
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if self.interleaved else (i, i + half)
            angle = position * self.base ** (-2 * i / self.rotary_dim)
            cos, sin = math.cos(angle), math.sin(angle)
            turned[a] = vector[a] * cos - vector[b] * sin
            turned[b] = vector[b] * cos + vector[a] * sin
        return turned


@dataclass(frozen=True)
class Slopes:
    """ALiBi: head `i` loses `slope(i)` per token of distance."""

    def slope(self, head: int, num_heads: int) -> float:
        power = 1
        while power * 2 <= num_heads:
            power *= 2
        if head < power:
            return 2.0 ** (-8 * (head + 1) / power)
        # The paper's code: heads past the power of two take every other slope of twice as many heads.
        return 2.0 ** (-8 * (2 * (head - power) + 1) / (2 * power))


@dataclass(frozen=True)
class Buckets:
    """T5: near distances have a bucket each, far ones share buckets that widen by a constant factor."""

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False

    def bucket(self, distance: int) -> int:
        """The bucket of `distance` = query position - key position, in whole numbers, so without rounding."""
        count, first = self.num_buckets, 0
        if self.bidirectional:
            count //= 2
            if distance < 0:
                first = count
            distance = abs(distance)
        distance = max(distance, 0)
        exact = count // 2
        if distance < exact:
            return first + distance
        # The largest j with distance / exact >= (max_distance / exact) ** (j / rest).
        rest = count - exact
        j = 0
        while j + 1 < rest and distance**rest * exact ** (j + 1) >= self.max_distance ** (j + 1) * exact**rest:
            j += 1
        return first + exact + j


Scheme = Rotary | Slopes | Buckets | None
