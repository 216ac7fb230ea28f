"""Rows of different lengths for flash attention: where the tokens of each stand among those of all, on the device."""

from collections.abc import Callable, Hashable
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .position_inputs import Positions

T = TypeVar("T")
Once = Callable[[Hashable, Callable[[], T]], T]
"""A function that keeps the result of another under a key, for all layers of a call."""

MAX_TOKENS = (1 << 31) - 1
"""Places of tokens are int32."""


class FlashRows(NamedTuple):
    """Where each row's tokens stand among those of all rows: int32 on the device."""

    queries: Tensor
    """[B + 1]: the first query of each row, and the number of all."""
    keys: Tensor
    """[B + 1]: the first key of each row, and an end."""
    used: Tensor
    """[B]: keys that a row has, counted from there."""


class RowsOf(NamedTuple):
    """What the rows of a call follow from."""

    positions: Positions
    lengths: tuple[int, ...]
    """Queries of each row, which lie one row after the other; none where each row has `length`, padding at its end."""
    batch: int
    length: int
    """The most queries of a row."""
    columns: int
    """Columns of the keys."""
    step: int
    """Tokens from one row of the keys to the next."""
    device: torch.device

    def make(self) -> tuple[FlashRows, int] | None:
        """The rows, and the most keys of one; None where the kernel would take padding for tokens."""
        causal, window = self.positions.causal, self.positions.window
        batch, length = self.batch, self.length
        if length == 1 and 0 in self.lengths:
            # With one query at most, the kernel takes each row to have one.
            return None
        begins, used = [], []
        for row, (low, begin, stop, before) in enumerate(self.positions.of_rows(batch)):
            if not self.lengths and (causal or window is not None):
                # A row with fewer new tokens ends with padding, which its own queries are before.
                if not causal and stop != before + length:
                    return None
                stop = before + length
                if stop - low > self.columns:
                    return None
            if window is not None and length == 1:
                begin = max(begin, before - window + 1)
            begins.append(row * self.step + begin - low)
            used.append(max(stop - begin, 0))
        queries = accumulate(self.lengths or (length,) * batch, initial=0)
        numbers = torch.tensor([*queries, *begins, batch * self.step, *used], dtype=torch.int32, device="cpu")
        # A copy from pageable host memory does not wait for the work that is queued on the device.
        parts = numbers.to(self.device, non_blocking=True).split_with_sizes((batch + 1, batch + 1, batch))
        return FlashRows(*parts), max(used)
