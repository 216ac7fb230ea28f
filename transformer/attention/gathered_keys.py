"""Attention of the queries of this rank's part of a sequence over the keys of all ranks, gathered once in each layer.

Each chunk attends as a call that follows the tokens before it: any split is one shot.
"""

from functools import partial

import torch
from torch import Tensor

from ..cache import (
    EMPTY,
    CacheContents,
    CachedLayer,
    KeyValueView,
    Lengths,
    SequenceCall,
    Step,
    lengthened,
    uncached_view,
)
from ..positions import ScoreBias
from .call import AttentionCall, SharedHeads
from .keys_in_parts import appended_part, cached_part, state_and_part
from .over_view import attend_over_view


def attend_over_gathered_keys(
    call: AttentionCall, step: Step, sequence: SequenceCall, heads: SharedHeads, in_parts: bool
) -> tuple[Tensor, CacheContents | None]:
    """Attended heads [B, H, L, D] of this rank's part, and the contents of the cache after the call. `in_parts`: each
    rank caches its own tokens, not all."""
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


def _views_of_windows(heads: SharedHeads, sequence: SequenceCall, reach: int, num_sinks: int) -> list[KeyValueView]:
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
    layer: CachedLayer, step: Step, sequence: SequenceCall, heads: SharedHeads, new: Tensor
) -> tuple[Tensor, CacheContents]:
    """Keys and values of all tokens in one tensor [2B, G, S, D], from `new` ones of this call, and the contents after
    it: this rank's tokens are cached."""
    state, part = state_and_part(layer, sequence, heads.key)
    if past := step.past_lengths[0]:
        own = cached_part(state)
        longest = max(part.count(rank) for rank in range(sequence.sequence.ranks))
        cached = part.joined(sequence.sequence.gathered(lengthened(torch.cat(own), longest, 2)))
        new = torch.cat((cached, new), 2)
    layout = sequence.layout
    runs = [
        [range(past + chunk.start, past + chunk.stop) for chunk in layout.chunks_of(rank)]
        for rank in range(layout.ranks)
    ]
    _, contents = appended_part(layer, step, (state, part.followed_by(runs)), heads.key, heads.value)
    return new, contents


def _halves(both: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, S, D] of both in one tensor [2B, G, S, D]."""
    key, value = both.chunk(2)
    return key, value
