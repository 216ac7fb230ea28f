"""Positions of the tokens that `compress` kept, of each key/value head, where a state counts them at others."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import NO_TOKEN
from .buffers import changed
from .lengths import EMPTY, Lengths


class KeptTokens(NamedTuple):
    """True positions of kept tokens, which a state counts as if they were the newest of their row.

    A state has tokens at positions that follow each other, as many in all heads of a row. After a compression each head
    has tokens of its own. They lie in order, and count at positions `first` to `end` (exclusive, the length of the row
    then), as if a window had evicted those before: so what appends, moves and truncates works as it is. No token counts
    at less than its true position. Where distances matter (windows, biases of scores) the true positions are read here;
    rotated keys have theirs in their numbers.

    Example: a row has read 10 tokens, and `compress` keeps 3. Head 0 keeps those at 0, 6 and 9, head 1 those at 2, 3
    and 8. Then `positions` is [[[0, 6, 9], [2, 3, 8]]], `first` is 7 and `end` 10: in both heads they count at 7, 8 and
    9. The next token has position 10 and counts there.
    """

    positions: Tensor
    """int64 [B, G, K]: that of the token that counts at `first + k`; NO_TOKEN from `end - first` on."""
    first: Lengths
    end: Lengths
    """Like `first` 0 for a row of which nothing was dropped."""

    def true_positions(self, counted: Tensor) -> Tensor:
        """int64 [B, G, S]: the true positions of the tokens that count at int64 [1 or B, S]."""
        first, end = (numbers.column(counted.device) for numbers in (self.first, self.end))
        batch, groups, _ = self.positions.shape
        counted, kept = counted.unsqueeze(1), ((counted >= first) & (counted < end)).unsqueeze(1)
        index = (counted - first.unsqueeze(1)).where(kept, 0).expand(batch, groups, -1)
        return self.positions.gather(2, index).where(kept, counted)

    def is_evicted(self, stored: Lengths) -> bool:
        """True if none of them is stored, from `stored` on: every token then counts at its own position."""
        return max(self.end - stored) <= 0

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "KeptTokens":
        """The same after a move."""
        return self._replace(positions=changed(change, self.positions))

    def selected(self, chosen: Sequence[int], index: Tensor) -> "KeptTokens":
        """The same of these rows, in this order; `index` has them on the device."""
        batch = self.positions.shape[0]
        first, end = (Lengths.of(each.expand(batch)[row] for row in chosen) for each in (self.first, self.end))
        return KeptTokens(changed(lambda tensor: tensor.index_select(0, index), self.positions), first, end)

    @classmethod
    def nothing(cls, like: Tensor) -> "KeptTokens":
        """Those of rows of which nothing was dropped, for keys like these [B, G, ...]."""
        return cls(torch.empty(*like.shape[:2], 0, dtype=torch.int64, device=like.device), EMPTY, EMPTY)

    @classmethod
    def concatenated(cls, every: "Sequence[KeptTokens]") -> "KeptTokens | None":
        """The rows of all in one batch; None where nothing was dropped of any."""
        width = max(each.positions.shape[2] for each in every)
        if width == 0:
            return None
        with torch.inference_mode(False):
            positions = torch.cat([padded(each.positions, width, NO_TOKEN) for each in every])
        first, end = (
            Lengths.of(chain.from_iterable(getattr(each, name).expand(each.positions.shape[0]) for each in every))
            for name in ("first", "end")
        )
        return cls(positions, first, end)


def padded(numbers: Tensor, width: int, value: int = 0) -> Tensor:
    """Numbers [B, G, K] with as many columns more as make `width`."""
    return F.pad(numbers, (0, width - numbers.shape[2]), value=value)
