"""Observation of a call for the policy of a `cache_budget`: its queries, and the attention that keys have had."""

import torch
from torch import Tensor

from ..cache import CacheContents, KeyValueView, Observation, Observed, Step
from .call import AttentionCall


def with_observed(call: AttentionCall, view: KeyValueView, contents: CacheContents, seen: Observation) -> CacheContents:
    """The contents after the call with what the policy needs of it and of earlier calls."""
    before, state = None if call.layer is None else call.layer.contents.ordered_state, contents.ordered_state
    if state is None:
        return contents
    counted = columns = None
    if seen.weights is not None:
        counted = state.counted_positions()
        columns = None if before is None else before.columns_of(counted)
    old = Observed() if before is None or before.observed is None else before.observed
    observed = old.after(seen, view, call.last_queries, counted, columns)
    return contents._replace(state=state._replace(observed=observed))


def summed(weights: Tensor, step: Step, view: KeyValueView, begin: int = 0) -> Tensor:
    """Weights [B, H, block, n + S] of queries from `begin` on, summed over the real ones and the heads of each group:
    [B, G, n + S] in at least float32, without a graph."""
    weights = weights.detach() if weights.dtype is torch.float64 else weights.detach().float()
    if min(step.new_lengths) < step.width:
        query = torch.arange(begin, begin + weights.shape[2], device="cpu")
        real = (query < step.new_lengths.column()).to(weights.device, non_blocking=True)
        weights = weights * real[:, None, :, None]
    batch, heads, block, columns = weights.shape
    groups = view.key.shape[1]
    return weights.view(batch, groups, heads // groups, block, columns).sum((2, 3))
