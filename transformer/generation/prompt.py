"""Prompt of a generation: its ids with padding on the left, its mask, and the number of tokens in each row."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import real_in_every_row
from ..cache import KnownMask
from ..errors import ArgumentError, DtypeError, ShapeError


class Prompt(NamedTuple):
    """A prompt that was checked. The host has looked at its mask once, and knows it from then on."""

    tokens: Tensor
    """int64 [B, L], padding on the left; [B, 0] of a prompt of vectors, which has no ids."""
    mask: KnownMask | None
    """None: no padding."""
    lengths: list[int]
    """Real tokens of each row."""
    vectors: Tensor | None = None
    """[B, L, E]: what stands in the place of embedded ids; None: there are ids."""

    @classmethod
    def of(
        cls, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> "Prompt":
        """The prompt of a caller, whose padding is moved to the left.

        Raises ArgumentError, ShapeError, DtypeError or DeviceError for ids, vectors or a mask that are none, and unless
        exactly one of ids and vectors is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ArgumentError(f"input_ids, inputs_embeds: expected exactly one of the two, got {given}")
        if inputs_embeds is not None:
            return cls._of_vectors(inputs_embeds, attention_mask)
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
        tokens, mask, lengths = _padded_on_the_left(input_ids.long(), attention_mask)
        return cls(tokens, mask, lengths)

    @classmethod
    def _of_vectors(cls, vectors: Tensor, attention_mask: Tensor | None) -> "Prompt":
        if not isinstance(vectors, Tensor):
            raise ArgumentError(f"inputs_embeds: expected vectors [B, L, E], got {type(vectors).__name__}")
        if vectors.ndim != 3 or 0 in vectors.shape:
            raise ShapeError(
                f"inputs_embeds: expected [B, L, E] with at least one row and one vector, got {list(vectors.shape)}"
            )
        if not vectors.is_floating_point():
            raise DtypeError(f"inputs_embeds: expected vectors of a float dtype, got {vectors.dtype}")
        # No history of the caller's: steps of a generation record no gradients.
        vectors, mask, lengths = _padded_on_the_left(vectors.detach(), attention_mask)
        tokens = torch.empty(vectors.shape[0], 0, dtype=torch.int64, device=vectors.device)
        return cls(tokens, mask, lengths, vectors)

    @property
    def inputs(self) -> Tensor:
        """What the model reads: ids int64 [B, L], or vectors [B, L, E]."""
        return self.tokens if self.vectors is None else self.vectors

    @property
    def columns(self) -> int:
        """Number of columns `L`, padding included."""
        return self.inputs.shape[1]

    def after(self, read: Sequence[int]) -> "Prompt":
        """The tokens after the first `read` ones of each row, of which one at least is left."""
        lengths = [length - count for length, count in zip(self.lengths, read, strict=True)]
        width = max(lengths)
        tokens = self.tokens[:, -width:]
        if min(lengths) == width:
            return Prompt(tokens, None, lengths)
        on_host = torch.arange(width, device="cpu") >= width - torch.tensor(lengths, device="cpu").unsqueeze(-1)
        return Prompt(tokens, KnownMask(on_host.to(tokens.device, non_blocking=True), on_host), lengths)

    def rows_on_host(self) -> list[Tensor]:
        """The ids of each row without padding, int64 [n] on the host."""
        return [row[len(row) - length :] for row, length in zip(self.tokens.cpu(), self.lengths, strict=True)]

    def repeated(self, copies: int) -> "Prompt":
        """Each row as often as this."""
        if copies == 1:
            return self
        rows = [row for row in range(len(self.lengths)) for _ in range(copies)]
        tokens = self.tokens.repeat_interleave(copies, 0)
        vectors = None if self.vectors is None else self.vectors.repeat_interleave(copies, 0)
        return Prompt(tokens, self.mask and self.mask.rows(rows), [self.lengths[row] for row in rows], vectors)

    @property
    def history(self) -> Tensor:
        """A copy of the ids for processors, with the first token of a row at its padding."""
        if self.mask is None or self.vectors is not None:
            return self.tokens.clone()
        real = self.mask.mask
        first = real.to(torch.uint8).argmax(-1, keepdim=True)
        return self.tokens.where(real, self.tokens.take_along_dim(first, 1))


def _padded_on_the_left(inputs: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, KnownMask | None, list[int]]:
    """Ids [B, L] or vectors [B, L, E] with 0 at their padding, which is moved to the left; their mask and lengths."""
    batch, columns = inputs.shape[:2]
    known = real_in_every_row("attention_mask", attention_mask, batch, columns, inputs.device)
    if known is None or bool(known.on_host.all()):
        return inputs, None, [columns] * batch
    order = known.on_host.byte().argsort(dim=-1, stable=True)
    on_host = known.on_host.take_along_dim(order, 1)
    order = order.to(inputs.device, non_blocking=True)
    real = known.mask.take_along_dim(order, 1)
    places, padding = (each.view(batch, columns, *[1] * (inputs.ndim - 2)) for each in (order, ~real))
    # The model embeds padding too, so its ids must be in the vocabulary.
    inputs = inputs.take_along_dim(places, 1).masked_fill(padding, 0)
    return inputs, KnownMask(real, on_host), on_host.sum(-1).tolist()
