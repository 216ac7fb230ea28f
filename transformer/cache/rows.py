"""Rows of a batch on the host: one number per row, or a single number where all rows are alike.

Lengths of conversations live here as plain tuples, so that a decode step never asks the device for them. A tuple of one
entry stands for every row: a batch of equal rows costs what one row costs.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

Rows = tuple[int, ...]


def alike(numbers: Iterable[int]) -> Rows:
    """The numbers as a tuple, of one entry where they are all equal."""
    rows = tuple(numbers)
    return rows[:1] if rows and rows.count(rows[0]) == len(rows) else rows


def spread(rows: Rows, batch: int) -> Rows:
    """One entry for each of `batch` rows."""
    return rows * batch if len(rows) == 1 else rows


def paired(first: Rows, second: Rows) -> tuple[Rows, Rows]:
    """Both with the same number of entries."""
    count = max(len(first), len(second))
    return spread(first, count), spread(second, count)


def plus(first: Rows, second: Rows) -> Rows:
    """Row by row, first + second."""
    if len(first) == 1 and len(second) == 1:
        return (first[0] + second[0],)
    return alike(a + b for a, b in zip(*paired(first, second), strict=True))


def minus(first: Rows, second: Rows) -> Rows:
    """Row by row, first - second."""
    if len(first) == 1 and len(second) == 1:
        return (first[0] - second[0],)
    return alike(a - b for a, b in zip(*paired(first, second), strict=True))


def at_least(rows: Rows, floor: Rows) -> Rows:
    """Row by row, the larger of the two."""
    if len(rows) == 1 and len(floor) == 1:
        return rows if rows[0] >= floor[0] else floor
    return alike(max(a, b) for a, b in zip(*paired(rows, floor), strict=True))


def at_most(rows: Rows, ceiling: Rows) -> Rows:
    """Row by row, the smaller of the two."""
    if len(rows) == 1 and len(ceiling) == 1:
        return rows if rows[0] <= ceiling[0] else ceiling
    return alike(min(a, b) for a, b in zip(*paired(rows, ceiling), strict=True))


def column(rows: Rows, device: torch.device | None = None) -> Tensor:
    """The numbers as int64 [1 or B, 1], to stand beside a dimension of tokens."""
    tensor = torch.tensor(rows, device="cpu").unsqueeze(-1)
    return tensor if device is None else tensor.to(device, non_blocking=True)
