"""Prefix of tokens that rows of a batch share: stored once, and read once for all of them (arXiv 2402.05099).

Repeated rows begin with the same tokens. Each distinct row of them is kept as it lies, in tensors that no later call
writes, and each row of the batch has only its number here and the tokens of its own after it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..codecs import Coding
from .buffers import changed, empty_slots
from .lengths import Lengths, on_device


class SharedPrefix(NamedTuple):
    """Keys and values [R, G, P, D] of R distinct rows, and for each row of the batch the number of the one it has.

    Records where the state has a coding. They are never written. A token's slot is its position. Where the prefix of a
    row ends, its own tokens begin: the state knows that, one number for each row of the batch.
    """

    key: Tensor
    value: Tensor
    rows: tuple[int, ...]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        return self.key, self.value

    def lengths(self, ends: Lengths) -> Lengths:
        """How many tokens each of the R rows has, where the rows of the batch have so many of them."""
        if ends.uniform:
            return ends
        of_row = dict(zip(self.rows, ends, strict=True))
        return Lengths.of(of_row[row] for row in range(self.key.shape[0]))

    def selected(self, chosen: Sequence[int]) -> "SharedPrefix":
        """The prefixes of these rows of the batch, in this order; those that no row has any more are dropped."""
        rows = tuple(self.rows[row] for row in chosen)
        kept = sorted({*rows})
        if len(kept) == self.key.shape[0]:
            return self._replace(rows=rows)
        index, number = on_device(kept, self.key.device), {row: number for number, row in enumerate(kept)}
        key, value = (changed(lambda tensor: tensor.index_select(0, index), tensor) for tensor in self.tensors)
        return SharedPrefix(key, value, tuple(number[row] for row in rows))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "SharedPrefix":
        """The same in changed tensors."""
        return self._replace(key=changed(change, self.key), value=changed(change, self.value))

    def decoded(self, coding: Coding) -> "SharedPrefix":
        """The numbers, where these are records."""
        key, value = coding.decoded(*self.tensors)
        return self._replace(key=key, value=value)

    def followed_by(self, own: Tensor, ends: Lengths, counts: Lengths, capacity: int, *, values: bool) -> Tensor:
        """Fresh keys, or values, [B, G, capacity, D]: of each row of the batch its `ends` tokens, and after them the
        first `counts` of its `own` [B, G, C, D]; zeros after these."""
        batch, shared = len(self.rows), self.value if values else self.key
        whole = empty_slots(own, capacity, batch)
        with torch.no_grad():
            for place, (row, end, count) in enumerate(
                zip(self.rows, ends.expand(batch), counts.expand(batch), strict=True)
            ):
                whole[place, :, :end] = shared[row, :, :end]
                whole[place, :, end : end + count] = own[place, :, :count]
        return whole
