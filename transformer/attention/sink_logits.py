"""Learned logit of each head that takes a share of its attention, as a parameter of an attention module."""

from typing import Any

import torch
from torch import nn

from ..errors import require_flag


class HasSinkLogits(nn.Module):
    """A module with `sink_logits` [H], a parameter, or None."""

    num_heads: int
    sink_logits: nn.Parameter | None

    def add_sink_logits(self, wanted: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Gives each head a logit of 0 where they are wanted. Raises ConfigurationError unless that is a flag."""
        require_flag("sink_logits", wanted)
        self.sink_logits = nn.Parameter(torch.zeros(self.num_heads, device=device, dtype=dtype)) if wanted else None

    def reset_sink_logits(self) -> None:
        """Sets the logits to 0."""
        if self.sink_logits is not None:
            nn.init.zeros_(self.sink_logits)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # Of modules that were pickled before there was a choice.
        if "sink_logits" not in self._parameters:
            self.__dict__.setdefault("sink_logits", None)
