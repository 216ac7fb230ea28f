"""Queries and summed attention weights of earlier calls, which a state keeps for the policy of a `cache_budget`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from .buffers import changed
from .kept import padded
from .policies import Needs


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
