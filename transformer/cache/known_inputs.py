"""Inputs of a generation's calls that the host knows, so that no layer asks the device for them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .lengths import on_device


class KnownMask(NamedTuple):
    """A padding mask bool [B, L], true for a real token, and the same on the CPU."""

    mask: Tensor
    on_host: Tensor

    @classmethod
    def all_real(cls, tokens: Tensor) -> "KnownMask":
        """The mask of tokens [B, L], or of vectors [B, L, E], without padding."""
        on_host = torch.ones(tokens.shape[:2], dtype=torch.bool, device="cpu")
        return cls(torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device), on_host)

    @classmethod
    def unless_all_real(cls, real: Sequence[Sequence[bool]], device: torch.device) -> "KnownMask | None":
        """The mask of these numbers, a list for each row; None if all of them are true."""
        if all(map(all, real)):
            return None
        on_host = torch.tensor(real, dtype=torch.bool, device="cpu")
        return cls(on_host.to(device, non_blocking=True), on_host)

    def columns(self, part: slice) -> "KnownMask":
        """The mask of some of the columns."""
        return KnownMask(self.mask[:, part], self.on_host[:, part])

    def rows(self, rows: Sequence[int]) -> "KnownMask":
        """The mask of these rows, in this order."""
        return KnownMask(self.mask[on_device(rows, self.mask.device)], self.on_host[list(rows)])

    def followed_by(self, columns: "KnownMask") -> "KnownMask":
        """The mask with more columns at its end."""
        mask, on_host = (torch.cat(both, 1) for both in zip(self, columns, strict=True))
        return KnownMask(mask, on_host)


class KnownInputs(NamedTuple):
    """What the host knows of one call's arguments; each is recognised by identity."""

    tokens: Tensor | None = None
    """Ids that are in the vocabulary."""
    mask: KnownMask | None = None

    def on_host(self, mask: Tensor) -> Tensor | None:
        """The numbers of `mask` on the CPU, if they are known."""
        return self.mask.on_host if self.mask is not None and self.mask.mask is mask else None


NOTHING_KNOWN = KnownInputs()
"""The inputs of a caller's own call."""


class Generation:
    """One generation, in which weights are taken to stay as they are, and the source that its calls give.

    The generation changes the source only together with the rows of its caches. So a layer that has projected it
    knows it by identity, without a look at its numbers.
    """

    __slots__ = ("source", "source_mask")

    def __init__(self) -> None:
        self.source: Tensor | None = None
        self.source_mask: Tensor | None = None

    def gives(self, kv: Tensor, mask: Tensor | None) -> bool:
        """True if these are the generation's own source and mask."""
        return self.source is kv and self.source_mask is mask
