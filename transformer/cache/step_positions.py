"""Positions of the tokens of one call, in each of the layouts in which layers have them."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ..masks import NO_TOKEN, Rule, positions
from .flat_run import FlatRun
from .lengths import Lengths
from .shared_sequence import SequenceCall
from .token_layout import TokenLayout

T = TypeVar("T")


class StepPositions:
    """The part of a `Step` that tells positions. Those that a caller gave, `position_ids`, count for the position
    scheme alone: `host_positions` and `query_positions` are the places in a row, by which it is decided who sees whom.
    """

    rule: Rule
    batch: int
    past_lengths: Lengths
    device: torch.device
    real: Tensor | None
    run: FlatRun | None
    at: Tensor | None
    sequence: SequenceCall | None
    layout: TokenLayout | None
    width: int
    uniform: bool

    @property
    def host_positions(self) -> range | Tensor:
        """Places of the left-aligned tokens in their rows, on the host: a range where all rows are equal."""
        raise NotImplementedError

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once for a key in all layers that share the step."""
        raise NotImplementedError

    @property
    def has_gaps(self) -> bool:
        """True if the tokens, all of them real, are not one run of positions: a part of a shared sequence."""
        return self.sequence is not None and self.sequence.is_part

    @property
    def position_ids(self) -> Tensor | None:
        """int64 [B, L]: positions that the caller gave, `NO_TOKEN` at padding; None: they are counted."""
        return None if self.layout is None else self.layout.position_ids

    @property
    def query_positions(self) -> range | Tensor:
        """Positions of the left-aligned tokens: a range where all rows are equal, else int64 [B, width]."""
        host = self.host_positions
        if isinstance(host, range) or self.at is not None:
            return host
        return self.once("query positions", partial(host.to, self.device, non_blocking=True))

    @property
    def sink_query_positions(self) -> range | Tensor:
        """Positions of the queries for scores with sinks, on the host: at most the rule's `max_sink_distance`."""
        host, max_sink_distance = self.host_positions, self.rule.max_sink_distance
        if max_sink_distance is None:
            return host
        if isinstance(host, Tensor):
            return host.clamp(max=max_sink_distance)
        if len(host) == 1:
            sink_query = min(host.start, max_sink_distance)
            return range(sink_query, sink_query + 1)
        return positions(host).unsqueeze(0).clamp(max=max_sink_distance)

    @property
    def token_positions(self) -> range | Tensor:
        """Positions of the columns as given: a range where all rows are equal and without padding, else int64 [B, L]
        with `NO_TOKEN` at padding. Those of the caller where there are any."""
        given = self.position_ids
        if given is not None:
            return given
        if self.real is None or self.at is not None:
            return self.query_positions
        return self.once("token positions", partial(self._given_positions, self.real))

    @property
    def flat_positions(self) -> range | Tensor:
        """Positions of the tokens of the flat run, on the host: a range for one row, else int64 [1, N]."""
        if self.run is None or len(self.run.lengths) == 1:
            return self.host_positions
        return self.once("flat positions", partial(self._flat_positions, self.run))

    def laid_out_ids(self, ids: Tensor, flat: bool) -> Tensor:
        """The caller's positions `ids` [B, L] of the tokens of the flat run, [1, N], or of the aligned ones."""
        if self.run is None:
            return ids
        taken = self.run.take(ids)
        return taken if flat else self.run.aligned(taken)

    def _ragged_positions(self) -> Tensor:
        if self.sequence is not None and self.sequence.is_part:
            return self.sequence.positions(self.past_lengths[0])
        rows = self.batch if self.run is None else len(self.run.lengths)
        return self.past_lengths.expand(rows).column() + torch.arange(self.width, device="cpu")

    def _flat_positions(self, run: FlatRun) -> Tensor:
        past = self.past_lengths.expand(len(run.lengths)).column().squeeze(-1)
        return (past[run.slots_on_host // run.width] + run.slots_on_host % run.width).unsqueeze(0)

    def _given_positions(self, real: Tensor) -> Tensor:
        if self.layout is not None and self.layout.segment_ids is not None:
            return self.layout.positions_in_documents(self.layout.segment_ids)
        position = self.past_lengths.column(self.device) + (real.long().cumsum(-1) - 1)
        return position.masked_fill(~real, NO_TOKEN)
