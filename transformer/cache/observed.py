"""Queries and summed attention weights of earlier calls, which a state keeps for the policy of a `cache_budget`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from .buffers import changed, ordinary, taken
from .kept import padded
from .key_value_view import KeyValueView
from .lengths import Lengths
from .policy import Needs


class Observation(NamedTuple):
    """Queries of one call, and the attention that each key of its view has had from them."""

    queries: Tensor
    """[B, H, width, D], left-aligned."""
    new_lengths: Lengths
    weights: Tensor | None = None
    """[B, G, n + S], the sinks of the view first; None where the policy needs none."""


class Observed(NamedTuple):
    """The last queries of each row, and the attention that each cached token has had from all queries so far.

    They are those of every call since the row's first token: no call was without them, and none was taken back.
    """

    queries: Tensor | None = None
    """[B, H, n, D], rotated, the newest at the end; zeros before a row's first."""
    weights: Tensor | None = None
    """[B, G, S] in at least float32, of the cached tokens in order: summed over queries and the heads of a group."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that there are."""
        return tuple(tensor for tensor in self if tensor is not None)

    @property
    def needs(self) -> Needs:
        """The needs of a policy that these are enough for."""
        return Needs(0 if self.queries is None else self.queries.shape[2], self.weights is not None)

    def before_tokens(self, rows: int) -> "Observed":
        """The same of so many rows before their first token."""
        with torch.inference_mode(False), torch.no_grad():
            queries = None if self.queries is None else self.queries.new_zeros(rows, *self.queries.shape[1:])
            weights = None if self.weights is None else self.weights.new_zeros(rows, self.weights.shape[1], 0)
        return Observed(queries, weights)

    def after(
        self,
        seen: Observation,
        view: KeyValueView,
        last_queries: int,
        counted: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> "Observed":
        """The same after one call more: so many of the last queries, and weights where the call shows some.

        Args:
            counted: int64 [1 or B, S], where the tokens that are cached after the call count, in order; for weights.
            columns: int64 [1 or B, S], their columns in the weights so far, below zero for new ones; None: all are new.
        """
        queries = weights = None
        with torch.no_grad():
            if last_queries:
                queries = ordinary(_last_queries(self.queries, seen, last_queries))
            if seen.weights is not None and counted is not None:
                weights = _of_tokens(seen.weights.detach(), view, counted)
                if self.weights is not None and columns is not None:
                    weights = weights + _at(self.weights, columns)
                weights = ordinary(weights)
        return Observed(queries, weights)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Observed":
        """The same after a move; sums keep their dtype."""
        queries, weights = self
        if queries is not None:
            queries = changed(change, queries)
        if weights is not None:
            weights = changed(lambda tensor: change(tensor).to(tensor.dtype), weights)
        return Observed(queries, weights)

    def selected(self, index: Tensor, width: int) -> "Observed":
        """The same of the rows in `index`, of which the longest has `width` cached tokens."""
        queries, weights = self
        if queries is not None:
            queries = changed(lambda tensor: tensor.index_select(0, index), queries)
        if weights is not None:
            weights = changed(lambda tensor: tensor.index_select(0, index)[:, :, :width].contiguous(), weights)
        return Observed(queries, weights)

    @classmethod
    def concatenated(cls, every: "Sequence[Observed | None]", width: int) -> "Observed | None":
        """The rows of all in one batch, of which the longest has `width` cached tokens; None where none has any.

        Raises ArgumentError where some have what others have not.
        """
        there = [each for each in every if each is not None]
        if not there:
            return None
        kinds = {each.needs for each in there}
        if len(there) < len(every) or len(kinds) > 1:
            raise ArgumentError(
                "caches: expected all to have been read with one cache_budget, got some that lack queries or attention "
                "weights that others have for its policy"
            )
        queries = [each.queries for each in there if each.queries is not None]
        weights = [padded(each.weights, width) for each in there if each.weights is not None]
        with torch.inference_mode(False), torch.no_grad():
            return cls(torch.cat(queries) if queries else None, torch.cat(weights) if weights else None)


def _last_queries(old: Tensor | None, seen: Observation, number: int) -> Tensor:
    """[B, H, number, D]: the last queries of each row, zeros before its first."""
    queries = seen.queries.detach()
    if old is None:
        batch, heads, _, head_dim = queries.shape
        old = queries.new_zeros(batch, heads, number, head_dim)
    both = torch.cat((old[:, :, -number:], queries), 2)
    return taken(both, seen.new_lengths, Lengths((number,)), number).contiguous()


def _of_tokens(weights: Tensor, view: KeyValueView, counted: Tensor) -> Tensor:
    """[B, G, S] of the tokens that count at int64 [1 or B, S], of weights [B, G, n + K] of the keys of `view`."""
    sinks = 0 if view.sink_key is None else view.sink_key.shape[2]
    main = _at(weights[:, :, sinks:], counted - view.first.column(weights.device))
    return main + _at(weights[:, :, :sinks], counted) if sinks else main


def _at(numbers: Tensor, column: Tensor) -> Tensor:
    """`numbers` [B, G, K] at columns int64 [1 or B, S], zeros where there is no such column: [B, G, S]."""
    if numbers.shape[2] == 0:
        return numbers.new_zeros(*numbers.shape[:2], column.shape[1])
    there = (column >= 0) & (column < numbers.shape[2])
    index = column.where(there, 0).unsqueeze(1).expand(*numbers.shape[:2], -1)
    return numbers.gather(2, index).where(there.unsqueeze(1), 0.0)
