"""View of the keys and values that the queries of one call may look at, with their positions."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..codecs import Coding
from ..masks import NO_TOKEN
from .kept import KeptTokens
from .lengths import EMPTY, Lengths
from .shared_prefix import SharedPrefix
from .step import Step


class PlacedTokens(NamedTuple):
    """Positions for distances, where the caller gave them: int64 [1 or B, width] and [1 or B, S]."""

    query: Tensor
    key: Tensor


class KeyValueView(NamedTuple):
    """Keys and values [B, G, S, D] of one call, left-aligned, and sinks [B, G, n, D] where a query meets one outside of
    its window.

    Column 0 of a row has position `first`; its tokens are those at positions `start` to `end` (exclusive).
    Sinks have positions 0 to n - 1. A query meets those outside of its window at a clamped distance, by scores of their
    own. A `prefix` has each row's tokens before `first`. With a `coding` all of these are records, as they are stored.
    """

    key: Tensor
    value: Tensor
    first: Lengths
    start: Lengths
    end: Lengths
    sink_key: Tensor | None = None
    sink_value: Tensor | None = None
    prefix: SharedPrefix | None = None
    coding: Coding | None = None
    kept: KeptTokens | None = None
    """True positions of tokens that `compress` kept, which count at others."""
    placed: PlacedTokens | None = None
    """Positions that the caller gave, for a bias of distances."""

    def decoded(self) -> "KeyValueView":
        """The view of the numbers, where these are records."""
        coding = self.coding
        if coding is None:
            return self
        key, value = coding.decoded(self.key, self.value)
        prefix = None if self.prefix is None else self.prefix.decoded(coding)
        view = self._replace(key=key, value=value, prefix=prefix, coding=None)
        if self.sink_key is None or self.sink_value is None:
            return view
        sink_key, sink_value = coding.decoded(self.sink_key, self.sink_value)
        return view._replace(sink_key=sink_key, sink_value=sink_value)

    @property
    def uniform(self) -> bool:
        """True if every column is a token, at the same position in all rows."""
        return self.end.uniform and self.start.uniform and self.first == self.start

    def key_run(self) -> range:
        """The positions of the columns, where they are uniform."""
        return range(self.first[0], self.first[0] + self.key.shape[2])

    def key_positions(self) -> Tensor:
        """int64 [1 or B, S]; NO_TOKEN for a column without a token."""
        device = self.key.device
        position = self.first.column(device) + torch.arange(self.key.shape[2], device=device)
        cached = (position >= self.start.column(device)) & (position < self.end.column(device))
        return position.where(cached, NO_TOKEN)

    def true_key_positions(self) -> Tensor:
        """int64 [B, G, S]: the same for each key/value head, where those of kept tokens are their true ones."""
        position = self.key_positions()
        if self.kept is None:
            return position.unsqueeze(1).expand(*self.key.shape[:2], -1)
        return self.kept.true_positions(position)

    def sink_positions(self) -> Tensor:
        """int64 [1 or B, n]; NO_TOKEN for a row that is shorter."""
        if self.sink_key is None:
            return torch.empty(1, 0, dtype=torch.int64, device=self.key.device)
        position = torch.arange(self.sink_key.shape[2], device=self.key.device)
        return position.where(position < self.end.column(self.key.device), NO_TOKEN)


def uncached_view(key: Tensor, value: Tensor, step: Step) -> KeyValueView:
    """The view of a call without a cache: the keys and values [B, G, S, D] of its tokens, and of those of the call
    that come before them."""
    window, number = step.rule.window, step.rule.num_sinks
    ends = step.total_lengths
    if window is None or not number or max(ends) <= window:
        return KeyValueView(key, value, EMPTY, EMPTY, ends)
    return KeyValueView(key, value, EMPTY, EMPTY, ends, key[:, :, :number], value[:, :, :number])
