"""Lengths: one number of tokens for each row of a batch, kept on the host.

A decode step never asks the device for them. A single entry stands for every row, so a batch of equal rows costs what
one row costs.
"""

import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Other = int | tuple[int, ...]
"""An operand: one number for all rows, or lengths."""


class Lengths(tuple[int, ...]):
    """One number for each row of a batch, or a single one where it is the same in all rows.

    A tuple, so it can be compared, hashed, indexed and iterated as one; but `+` and `-` work row by row, with other
    lengths, with a plain tuple of them, or with one number for all rows.

    Example: `Lengths((5, 2)) + 1 == (6, 3)`, `Lengths((5, 2)) - (4, 1) == (1,)`, `max(Lengths((5, 2))) == 5`.
    """

    __slots__ = ()

    @classmethod
    def of(cls, numbers: Iterable[int]) -> "Lengths":
        """These numbers, in a single entry where they are all equal."""
        lengths = cls(numbers)
        return cls(lengths[:1]) if lengths.count(lengths[0] if lengths else 0) == len(lengths) else lengths

    @property
    def uniform(self) -> bool:
        """True if one number stands for all rows."""
        return len(self) == 1

    def __add__(self, other: Other) -> "Lengths":  # type: ignore[override]
        """Row by row, self + other."""
        return self._by_row(operator.add, other)

    __radd__ = __add__

    def __sub__(self, other: Other) -> "Lengths":
        """Row by row, self - other."""
        return self._by_row(operator.sub, other)

    def __rsub__(self, other: Other) -> "Lengths":
        """Row by row, other - self."""
        return self._by_row(_subtracted, other)

    def maximum(self, other: Other) -> "Lengths":
        """Row by row, the larger of the two."""
        return self._by_row(max, other)

    def minimum(self, other: Other) -> "Lengths":
        """Row by row, the smaller of the two."""
        return self._by_row(min, other)

    def expand(self, batch: int) -> "Lengths":
        """The same with one entry for each of `batch` rows."""
        return Lengths(self * batch) if len(self) == 1 else self

    def column(self, device: torch.device | None = None) -> Tensor:
        """The numbers as int64 [1 or B, 1], to stand beside a dimension of tokens."""
        return on_device(self, device).unsqueeze(-1)

    def _by_row(self, function: Callable[[int, int], int], other: Other) -> "Lengths":
        if not isinstance(other, tuple):
            other = (other,)
        if len(self) == len(other) == 1:
            return Lengths((function(self[0], other[0]),))
        own = self * len(other) if len(self) == 1 else self
        others = other * len(self) if len(other) == 1 else other
        if len(own) != len(others):
            raise ValueError(f"expected lengths of {len(own)} rows, or one for all rows, got {len(others)}")
        numbers = tuple(map(function, own, others))
        return Lengths(numbers[:1] if numbers.count(numbers[0]) == len(numbers) else numbers) if numbers else Lengths()


def _subtracted(number: int, other: int) -> int:
    return other - number


def on_device(numbers: Sequence[int], device: torch.device | None) -> Tensor:
    """The numbers as int64 [N]. The host does not wait for the work that is queued on the device."""
    tensor = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    return tensor if device is None else tensor.to(device, non_blocking=True)


EMPTY = Lengths((0,))
"""No tokens in any row."""
