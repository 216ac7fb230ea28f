"""Prompt of a generation: its ids with padding on the left, its mask, and the number of tokens in each row."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import real_in_every_row
from ..cache import KnownMask
from ..errors import ArgumentError, DtypeError, ShapeError


class Prompt(NamedTuple):
    """A prompt that was checked. The host has looked at its mask once, and knows it from then on."""

    tokens: Tensor
    """int64 [B, L], padding on the left."""
    mask: KnownMask | None
    """None: no padding."""
    lengths: list[int]
    """Real tokens of each row."""

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor | None) -> "Prompt":
        """The prompt of a caller, whose padding is moved to the left.

        Raises ArgumentError, ShapeError, DtypeError or DeviceError for ids or a mask that are none.
        """
        if not isinstance(input_ids, Tensor):
            raise ArgumentError(
                f"input_ids: expected a tensor int64 [B, L], got {type(input_ids).__name__}; give torch.as_tensor(ids)"
            )
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ShapeError(
                f"input_ids: expected [B, L] with at least one row and one token, got {list(input_ids.shape)}"
            )
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise DtypeError(f"input_ids: expected int64 token ids, got {input_ids.dtype}")
        input_ids = input_ids.long()
        batch, length = input_ids.shape
        known = real_in_every_row("attention_mask", attention_mask, batch, length, input_ids.device)
        if known is None or bool(known.on_host.all()):
            return cls(input_ids, None, [length] * batch)
        order = known.on_host.byte().argsort(dim=-1, stable=True)
        on_host = known.on_host.take_along_dim(order, 1)
        order = order.to(input_ids.device, non_blocking=True)
        real = known.mask.take_along_dim(order, 1)
        # The model embeds padding too, so its ids must be in the vocabulary.
        tokens = input_ids.take_along_dim(order, 1).masked_fill(~real, 0)
        return cls(tokens, KnownMask(real, on_host), on_host.sum(-1).tolist())

    def repeated(self, copies: int) -> "Prompt":
        """Each row as often as this."""
        if copies == 1:
            return self
        rows = [row for row in range(len(self.lengths)) for _ in range(copies)]
        tokens = self.tokens.repeat_interleave(copies, 0)
        return Prompt(tokens, self.mask and self.mask.rows(rows), [self.lengths[row] for row in rows])

    @property
    def history(self) -> Tensor:
        """A copy of the ids for processors, with the first token of a row at its padding."""
        if self.mask is None:
            return self.tokens.clone()
        real = self.mask.mask
        first = real.to(torch.uint8).argmax(-1, keepdim=True)
        return self.tokens.where(real, self.tokens.take_along_dim(first, 1))
