"""The tokens of one call, whoever attends to them."""

from typing import NamedTuple

import torch
from torch import Tensor

from .lengths import EMPTY, Lengths


class Chunk(NamedTuple):
    """How many tokens a call brings and which of them are real: the host's one look at the mask."""

    batch: int
    tokens: int
    """L as given, padding included."""
    new_lengths: Lengths
    """How many real tokens each row gains."""
    device: torch.device
    real: Tensor | None
    """bool [B, L], true for a real token; None where all are."""
    order: Tensor | None
    """int64 [B, width]: the given column of each left-aligned token; None where they stand so already."""

    @classmethod
    def of(cls, x: Tensor, real: Tensor | None, on_host: Tensor | None = None) -> "Chunk":
        """The chunk `x` [B, L, E] of which `real` (bool [B, L]) are tokens; None: all, and nothing is looked at.

        `on_host` is the same mask on the CPU, where somebody has brought it there.
        """
        batch, tokens = x.shape[:2]
        if real is None:
            return cls(batch, tokens, Lengths((tokens,)), x.device, None, None)
        on_host = real.cpu() if on_host is None else on_host
        new_lengths = Lengths.of(on_host.sum(-1).tolist()) or EMPTY
        if max(new_lengths) == tokens == min(new_lengths):
            real = None
        order = None
        if not bool((on_host[:, :-1] >= on_host[:, 1:]).all()):
            # A stable sort by "is padding" brings the real tokens of each row to the front, in their order.
            order = (~on_host).to(torch.uint8).argsort(dim=-1, stable=True)[:, : max(new_lengths)].to(x.device)
        return cls(batch, tokens, new_lengths, x.device, real, order)
