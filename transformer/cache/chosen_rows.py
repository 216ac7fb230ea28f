"""Rows that `select` is given: indices, or a mask of the batch."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError, shown


def chosen_rows(rows: Sequence[int] | Tensor, batch: int | None) -> list[int]:
    """The indices of these rows of a batch (None: not known yet). Raises ArgumentError for what are none."""
    if isinstance(rows, Tensor):
        if rows.dtype == torch.bool:
            if rows.shape != (batch,):
                raise ArgumentError(f"rows: expected a mask of shape [{batch}], got {list(rows.shape)}")
            rows = rows.nonzero().squeeze(-1)
        if rows.ndim != 1 or rows.is_floating_point() or rows.is_complex():
            raise ArgumentError(f"rows: expected indices of shape [rows], got {list(rows.shape)} of {rows.dtype}")
        rows = rows.tolist()
    if not isinstance(rows, Iterable):
        raise ArgumentError(f"rows: expected indices, or a bool tensor [B], got {type(rows).__name__}")
    chosen = list(rows)
    wrong = [row for row in chosen if type(row) is not int or row < 0 or (batch is not None and row >= batch)]
    if wrong or not chosen:
        raise ArgumentError(
            f"rows: expected at least one index from 0 to {(batch or 1) - 1}, got {shown(wrong or chosen)}; "
            "to forget all rows, clear() the cache"
        )
    return chosen
