"""Self-attention over a sequence that ranks share: queries of a part over gathered keys, or of all over keys in parts.

A call that is given this rank's part gathers keys and values once, and attends chunk by chunk, each as a call that
follows the tokens before it: any split is one shot (ring attention has the same balance, arXiv 2311.09431). A call that
is given all tokens, such as a decode step, attends over the keys that this rank has, and the results of all ranks are
merged by their log-sum-exp (flash decoding, arXiv 2311.01282).
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import (
    EMPTY,
    CacheContents,
    CachedLayer,
    KeyValueView,
    Lengths,
    SelfAttentionState,
    SequenceCall,
    SequencePart,
    Step,
    dealt,
    lengthened,
    uncached_view,
)
from ..errors import ArgumentError, CacheStateError
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
from .call import AttentionCall
from .over_view import attend_over_view

MOST_SCORES = 1 << 24
"""Numbers of a bias that are formed at once, for queries that are given with all others."""


class OverRanks(NamedTuple):
    """Attended heads [B, H, L, D], and the contents of the module's cache after the call; None: as before."""

    out: Tensor
    contents: CacheContents | None


class Heads(NamedTuple):
    """Queries [B, H, L, D], keys and values [B, G, L, D] of the tokens of one call, rotated; see `attend_over_view`."""

    query: Tensor
    key: Tensor
    value: Tensor
    unrotated: Tensor | None


def attend_over_ranks(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, unrotated: Tensor | None
) -> OverRanks | None:
    """The result of a call over a shared sequence; None where every rank has all tokens and attends by itself."""
    step, layer = call.step, call.layer
    if step is None or step.sequence is None:
        raise RuntimeError("attend_over_ranks: expected a step of a shared sequence")
    if call.attn_bias is not None or call.return_weights:
        name = "attn_bias: expected None" if call.attn_bias is not None else "return_weights: expected False"
        raise ArgumentError(f"{name} in a shared sequence, of which a rank has a part; call outside of share_sequence")
    sequence, heads = step.sequence, Heads(query, key, value, unrotated)
    in_parts = layer is not None and keeps_parts(layer.contents, step)
    if sequence.is_part:
        out, contents = _over_gathered_keys(call, step, sequence, heads, in_parts)
        return OverRanks(out, contents)
    if layer is None or not in_parts:
        return None
    return _over_keys_in_parts(call, layer, step, sequence, heads)


def keeps_parts(contents: CacheContents, step: Step) -> bool:
    """True if each rank caches a part of the tokens. Every rank caches all of a window's, which are few, and goes on
    with all of what was read whole."""
    state = contents.state
    if isinstance(state, SelfAttentionState) and max(state.length):
        return state.part is not None
    return step.rule.window is None


# --- this rank's queries over gathered keys -------------------------------------------------------------------------


def _over_gathered_keys(
    call: AttentionCall, step: Step, sequence: SequenceCall, heads: Heads, in_parts: bool
) -> tuple[Tensor, CacheContents | None]:
    past, layer, contents, rule = step.past_lengths[0], call.layer, None, step.rule
    chunks, layout = sequence.chunks, sequence.layout
    reach = None if rule.window is None or not rule.causal or sequence.row_lengths is not None else rule.window - 1
    if layer is None and reach is not None and max(reach, rule.num_sinks) < len(layout.chunk(0)):
        views = _views_of_windows(heads, sequence, reach, rule.num_sinks)
    else:
        pair = torch.cat((heads.key, heads.value))
        pair = layout.gathered(sequence.sequence, pair, 2)
        whole = step.once(
            "whole",
            partial(Step, rule, step.batch, layout.length, step.past_lengths, Lengths((layout.length,)), step.device),
        )
        if layer is not None and in_parts:
            pair, contents = _after_parts(layer, step, sequence, heads, pair)
            view = KeyValueView(*_halves(pair), EMPTY, EMPTY, whole.total_lengths)
        elif layer is not None:
            view, contents = layer.append(*_halves(pair), whole)
        else:
            view = uncached_view(*_halves(pair), whole)
        if rule.causal:
            views = [_before(view, past + chunk.stop) for chunk in chunks]
        else:
            ends = view.end if sequence.row_lengths is None else sequence.row_lengths
            views = [view._replace(end=ends)] * 2
    outs, begin = [], 0
    for number, (chunk, view) in enumerate(zip(chunks, views, strict=True)):
        queries = heads.query.narrow(2, begin, len(chunk))
        unrotated = None if heads.unrotated is None else heads.unrotated.narrow(2, begin, len(chunk))
        of_chunk = call._replace(step=_step_of_chunk(call, step, number, chunk), layer=None)
        outs.append(attend_over_view(of_chunk, view, queries, unrotated)[0])
        begin += len(chunk)
    return torch.cat(outs, 2), contents


def _step_of_chunk(call: AttentionCall, step: Step, number: int, chunk: range) -> Step:
    """The step of a call with the tokens of one chunk, after all tokens before it. That of a learned bias serves one
    call."""
    past, new = step.past_lengths + chunk.start, Lengths((len(chunk),))
    make, position = partial(Step, step.rule, step.batch, len(chunk), past, new, step.device), call.heads.position
    if isinstance(position, ScoreBias) and position.learned:
        return step.once_in_call(("chunk", number), lambda: make().for_one_call())
    return step.once(("chunk", number), make)


def _before(view: KeyValueView, end: int) -> KeyValueView:
    """The view of the tokens before position `end`."""
    columns = end - view.first[0]
    key, value = (tensor.narrow(2, 0, columns) for tensor in (view.key, view.value))
    return view._replace(key=key, value=value, end=Lengths((end,)))


def _views_of_windows(heads: Heads, sequence: SequenceCall, reach: int, num_sinks: int) -> list[KeyValueView]:
    """The keys that this rank's two chunks see through a window: each chunk's own and the last `reach` of the chunk
    before it. The ends of all chunks are gathered, whatever their length."""
    layout, rank = sequence.layout, sequence.sequence.rank
    both, cut = torch.cat((heads.key, heads.value)), len(sequence.chunks[0])
    early, late = both[:, :, :cut], both[:, :, cut:]
    ends = torch.cat((early.narrow(2, early.shape[2] - reach, reach), late.narrow(2, late.shape[2] - reach, reach)), 2)
    first = early.narrow(2, 0, num_sinks)
    gathered = sequence.sequence.gathered(torch.cat((ends, first), 2))
    sinks: tuple[Tensor, Tensor] | tuple[None, None] = None, None
    if num_sinks and layout.length > reach + 1:
        sinks = _halves(gathered[0].narrow(2, 2 * reach, num_sinks))
    views = []
    for number, own, chunk in zip((rank, 2 * layout.ranks - 1 - rank), (early, late), sequence.chunks, strict=True):
        before = number - 1
        if before >= 0:
            owner, place = (before, 0) if before < layout.ranks else (2 * layout.ranks - 1 - before, reach)
            own = torch.cat((gathered[owner].narrow(2, place, reach), own), 2)
        begin = Lengths((max(chunk.start - reach, 0),)) if before >= 0 else EMPTY
        views.append(KeyValueView(*_halves(own), begin, begin, Lengths((chunk.stop,)), *sinks))
    return views


def _after_parts(
    layer: CachedLayer, step: Step, sequence: SequenceCall, heads: Heads, new: Tensor
) -> tuple[Tensor, CacheContents]:
    """Keys and values of all tokens in one tensor [2B, G, S, D], from `new` ones of this call, and the contents after
    it: this rank's tokens are cached."""
    state, part = _state_and_part(layer, sequence, heads.key)
    if past := step.past_lengths[0]:
        own = _cached(state)
        longest = max(part.count(rank) for rank in range(sequence.sequence.ranks))
        cached = part.joined(sequence.sequence.gathered(lengthened(torch.cat(own), longest, 2)))
        new = torch.cat((cached, new), 2)
    layout = sequence.layout
    runs = [
        [range(past + chunk.start, past + chunk.stop) for chunk in layout.chunks_of(rank)]
        for rank in range(layout.ranks)
    ]
    _, contents = _appended(layer, step, (state, part.followed_by(runs)), heads.key, heads.value)
    return new, contents


# --- all queries over keys in parts ---------------------------------------------------------------------------------


def _over_keys_in_parts(
    call: AttentionCall, layer: CachedLayer, step: Step, sequence: SequenceCall, heads: Heads
) -> OverRanks:
    (past,), ranks = step.past_lengths, sequence.sequence
    state, part = _state_and_part(layer, sequence, heads.key)
    runs = dealt(past, step.width, ranks.ranks)
    key, value = (
        torch.cat([tensor.narrow(2, run.start - past, len(run)) for run in runs[ranks.rank]] or [tensor[:, :, :0]], 2)
        for tensor in (heads.key, heads.value)
    )
    before, part = part.count(), part.followed_by(runs)
    (key, value), contents = _appended(layer, step, (state, part), key, value)
    own = _own_attention(call, step, heads.query, (key, value), part, before)
    every = ranks.gathered(torch.cat((own.out, own.lse.unsqueeze(-1)), -1)).flatten(1, 3).unsqueeze(0)
    # In the order of the ranks, and so to equal bits on all of them.
    out = merge_attention_states(every[..., :-1], every[..., -1])
    return OverRanks(out.view(heads.query.shape).to(heads.query.dtype), contents)


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


# --- the cache of this rank's part ----------------------------------------------------------------------------------


def _state_and_part(layer: CachedLayer, sequence: SequenceCall, key: Tensor) -> tuple[SelfAttentionState, SequencePart]:
    """This rank's tokens so far, and those of the others."""
    state, ranks = layer.contents.ordered_state, sequence.sequence
    if state is None or state.part is None:
        # Without buffers of sinks, which only a window needs.
        return SelfAttentionState.empty(key, 0), SequencePart.empty(ranks.rank, ranks.ranks)
    if (state.part.rank, len(state.part.runs)) != (ranks.rank, ranks.ranks):
        raise CacheStateError(
            f"kv_cache: expected a call by rank {state.part.rank} of the {len(state.part.runs)} that share its tokens, "
            f"got one by rank {ranks.rank} of {ranks.ranks}; share the sequence over the same ranks, or clear the cache"
        )
    return state, state.part


def _appended(
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
        raise RuntimeError("_appended: expected a state")
    state = written.counted_to(step.total_lengths[0], part)
    return _cached(state), contents._replace(state=state)


def _cached(state: SelfAttentionState) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, K, D] of this rank's tokens, in order."""
    (first,), (end,) = state.slot(state.start), state.slot(state.length)
    return state.buffers.key.narrow(2, first, end - first), state.buffers.value.narrow(2, first, end - first)


def _halves(both: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, S, D] of both in one tensor [2B, G, S, D]."""
    key, value = both.chunk(2)
    return key, value
