"""Budget of a layer's cache: the most tokens after a call, the policy, and what a call observes for it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigurationError, require_count, shown
from .buffers import ordinary, taken
from .compress import check_observed
from .contents import CacheContents
from .key_value_view import KeyValueView
from .lengths import Lengths
from .observed import Observed
from .policies import NOTHING, AnyPolicy, Needs, is_policy
from .state import SelfAttentionState


class CacheBudget(NamedTuple):
    """At most `tokens` of each row are cached after a call; `policy` says which."""

    tokens: int
    policy: AnyPolicy

    @classmethod
    def of(cls, given: Any, num_sinks: int = 0) -> "CacheBudget | None":
        """The budget of `(tokens, policy)`, or None. Raises ConfigurationError for anything else, and for so few tokens
        that the sinks of a window take them all."""
        if given is None:
            return None
        if not isinstance(given, tuple | list) or len(given) != 2 or not is_policy(given[1]):
            raise ConfigurationError(
                f"cache_budget: expected None, or (tokens, policy) with a policy of transformer.cache.policies or a "
                f"function, got {shown(given)}"
            )
        require_count("cache_budget, tokens", given[0], least=num_sinks + 1)
        return cls(*given)

    def __repr__(self) -> str:
        return f"({self.tokens}, {self.policy!r})"

    def most_held(self, prompt: Lengths, total: Lengths) -> Lengths:
        """The most tokens of each row while a generation runs: those of its first call, and then one at a time."""
        return total.minimum(prompt.maximum(self.tokens + 1))

    def needs_after(self, contents: CacheContents | None) -> Needs:
        """What the policy needs of a call after these contents. Raises CacheStateError where earlier calls did not keep
        it."""
        needs = Needs.of(self.policy)
        state = None if contents is None or needs == NOTHING else contents.state
        if state is not None and max(state.length):
            check_observed(self.policy, state.observed if isinstance(state, SelfAttentionState) else None)
        return needs


class Observation(NamedTuple):
    """What a call shows of itself: its queries, and the attention that each key of its view has had from them."""

    queries: Tensor
    """[B, H, width, D], left-aligned."""
    new_lengths: Lengths
    weights: Tensor | None = None
    """[B, G, n + S], the sinks of the view first; None where the policy needs none."""


def observed_after(
    before: SelfAttentionState | None,
    state: SelfAttentionState,
    seen: Observation,
    view: KeyValueView,
    last_queries: int,
) -> Observed:
    """What is observed up to `state`, which follows `before` by one call: so many queries, and weights where seen."""
    old = Observed() if before is None or before.observed is None else before.observed
    queries = weights = None
    with torch.no_grad():
        if last_queries:
            queries = ordinary(_last_queries(old.queries, seen, last_queries))
        if seen.weights is not None:
            weights = ordinary(_summed(before, state, seen.weights, view))
    return Observed(queries, weights)


def _last_queries(old: Tensor | None, seen: Observation, number: int) -> Tensor:
    """[B, H, number, D]: the last queries of each row, zeros before its first."""
    queries = seen.queries.detach()
    if old is None:
        batch, heads, _, head_dim = queries.shape
        old = queries.new_zeros(batch, heads, number, head_dim)
    return taken(
        torch.cat((old[:, :, -number:], queries), 2), seen.new_lengths, Lengths((number,)), number
    ).contiguous()


def _summed(before: SelfAttentionState | None, state: SelfAttentionState, new: Tensor, view: KeyValueView) -> Tensor:
    """[B, G, S] of the tokens of `state` in order: the sums of `before`, and the `new` ones of the keys of `view`."""
    counted = state.counted_positions()
    sinks = 0 if view.sink_key is None else view.sink_key.shape[2]
    new = new.detach()
    total = _at(new[:, :, sinks:], counted - view.first.column(new.device))
    if sinks:
        total = total + _at(new[:, :, :sinks], counted)
    old = None if before is None or before.observed is None else before.observed.weights
    if before is not None and old is not None:
        evicted = before.evicted_sinks().column(new.device)
        column = counted.where(counted < evicted, counted - before.start.column(new.device) + evicted)
        was_there = counted < before.length.column(new.device)
        total = total + _at(old, column.where(was_there, -1))
    return total


def _at(numbers: Tensor, column: Tensor) -> Tensor:
    """`numbers` [B, G, K] at columns int64 [1 or B, S], zeros where there is no such column: [B, G, S]."""
    there = (column >= 0) & (column < numbers.shape[2])
    index = column.where(there, 0).unsqueeze(1).expand(*numbers.shape[:2], -1)
    return numbers.gather(2, index).where(there.unsqueeze(1), 0.0)
