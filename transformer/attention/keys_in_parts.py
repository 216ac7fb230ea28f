"""Attention of all queries, which every rank has, over the keys that this rank caches; and the cache of that part.

The results of all ranks are merged by their log-sum-exp (flash decoding, arXiv 2311.01282).
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..cache import (
    CacheContents,
    CachedLayer,
    Lengths,
    SelfAttentionState,
    SequenceCall,
    SequencePart,
    Step,
    dealt,
)
from ..errors import CacheStateError
from ..kernels import (
    AttentionState,
    Positions,
    as_bias,
    attention_state,
    biased_attention_state,
    merge_attention_states,
    scores_dtype,
)
from ..masks import positions, visible
from ..positions import ScoreBias
from .call import AttentionCall, SharedHeads

MOST_SCORES = 1 << 24
"""Numbers of a bias that are formed at once, for queries that are given with all others."""


def attend_over_keys_in_parts(
    call: AttentionCall, layer: CachedLayer, step: Step, sequence: SequenceCall, heads: SharedHeads
) -> tuple[Tensor, CacheContents]:
    """Attended heads [B, H, L, D], with equal bits on all ranks, and the contents of the cache after the call."""
    (past,), ranks = step.past_lengths, sequence.sequence
    state, part = state_and_part(layer, sequence, heads.key)
    runs = dealt(past, step.width, ranks.ranks)
    key, value = (
        torch.cat([tensor.narrow(2, run.start - past, len(run)) for run in runs[ranks.rank]] or [tensor[:, :, :0]], 2)
        for tensor in (heads.key, heads.value)
    )
    before, part = part.count(), part.followed_by(runs)
    (key, value), contents = appended_part(layer, step, (state, part), key, value)
    own = _own_attention(call, step, heads.query, (key, value), part, before)
    every = ranks.gathered(torch.cat((own.out, own.lse.unsqueeze(-1)), -1)).flatten(1, 3).unsqueeze(0)
    # In the order of the ranks, and so to equal bits on all of them.
    out = merge_attention_states(every[..., :-1], every[..., -1])
    return out.view(heads.query.shape).to(heads.query.dtype), contents


def _own_attention(
    call: AttentionCall, step: Step, query: Tensor, own: tuple[Tensor, Tensor], part: SequencePart, before: int
) -> AttentionState:
    """Attention of all queries over this rank's tokens, of which the call found the first `before`."""
    kernel, position, (past,) = call.heads.kernel, call.heads.position, step.past_lengths
    score_bias = position if isinstance(position, ScoreBias) else None
    count, width = own[0].shape[2], query.shape[2]
    # What every query sees needs no bias.
    plain = 0 if score_bias is not None else count if width == 1 or not step.rule.causal else before
    states = []
    if plain or not count:
        key, value = (tensor.narrow(2, 0, plain) for tensor in own)
        states.append(attention_state(kernel, query, key, value, Positions((0,), (0,), (plain,), (0,), False)))
    if plain < count:
        key, value = (tensor.narrow(2, plain, count - plain) for tensor in own)
        key_at = part.positions()[plain:].to(query.device, non_blocking=True)
        blocks, size = [], max(1, MOST_SCORES // (query.shape[0] * query.shape[1] * (count - plain)))
        for begin in range(0, width, size):
            some = query.narrow(2, begin, min(size, width - begin))
            at = positions(range(past + begin, past + begin + some.shape[2]), query.device)
            mask = visible(at, key_at, step.rule)
            bias = as_bias(mask)
            if score_bias is not None:
                bias = bias + score_bias.bias_for(at.unsqueeze(-1) - key_at, scores_dtype(query))
            blocks.append(biased_attention_state(kernel, some, key, value, bias))
        states.append(AttentionState(*(torch.cat(each, 2) for each in zip(*blocks, strict=True))))
    return states[0] if len(states) == 1 else states[0].merged(states[1])


def state_and_part(layer: CachedLayer, sequence: SequenceCall, key: Tensor) -> tuple[SelfAttentionState, SequencePart]:
    """This rank's tokens so far, and those of the others."""
    state, ranks = layer.contents.ordered_state, sequence.sequence
    if state is None or state.part is None:
        # Without buffers of sinks, which only a window needs.
        return SelfAttentionState.empty(key, 0), SequencePart.empty(ranks.rank, ranks.ranks)
    if not state.part.is_of(ranks.rank, ranks.ranks):
        raise CacheStateError(
            f"kv_cache: expected a call by rank {state.part.rank} of the {len(state.part.runs)} that share its tokens, "
            f"got one by rank {ranks.rank} of {ranks.ranks}; share the sequence over the same ranks, or clear the cache"
        )
    return state, state.part


def appended_part(
    layer: CachedLayer, step: Step, after: tuple[SelfAttentionState, SequencePart], key: Tensor, value: Tensor
) -> tuple[tuple[Tensor, Tensor], CacheContents]:
    """Keys and values of this rank's tokens with the new ones of its own, and the contents after the call, in which the
    ranks have these parts."""
    state, part = after
    layer = replace(layer, contents=layer.contents._replace(state=state._replace(part=None)))
    contents, count = layer.contents, key.shape[2]
    if count:
        own = Step(step.rule, step.batch, count, state.length, Lengths((count,)), step.device)
        _, contents = layer.append(key, value, own)
    written = contents.ordered_state
    if written is None:
        raise RuntimeError("appended_part: expected a state")
    state = written.counted_to(step.total_lengths[0], part)
    return cached_part(state), contents._replace(state=state)


def cached_part(state: SelfAttentionState) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, K, D] of this rank's tokens, in order."""
    (first,), (end,) = state.slot(state.start), state.slot(state.length)
    return state.buffers.key.narrow(2, first, end - first), state.buffers.value.narrow(2, first, end - first)
