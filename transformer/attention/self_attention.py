"""Self-attention, with and without a cache: project, rotate, append, attend, project out."""

import torch
from torch import Tensor

from ..cache import (
    EMPTY,
    CacheContents,
    FlatRun,
    KeyValueView,
    Observation,
    PlacedTokens,
    StaticLayout,
    Step,
    TokenLayout,
    compiled_layout,
    uncached_view,
)
from ..masks import Rule
from ..plain import is_token_wise
from ..positions import Rotation, ScoreBias
from .by_positions import attend_flat
from .call import Attended, AttentionCall, SharedHeads
from .layouts import refuse_layout
from .observation import with_observed
from .over_view import attend_over_view
from .rows import attend_by_row, in_pieces, use_rows
from .shared_prefix import attend_beside_prefix, attends_beside_prefix
from .shared_sequence import attend_over_ranks


def self_attention(call: AttentionCall) -> Attended:
    """Output, weights where asked for, and the contents of the cache after the call."""
    heads, layer, step = call.heads, call.layer, call.step
    if step is None:
        raise RuntimeError("self_attention: expected a call with a step")
    if step.width == 0 or step.batch == 0:
        return _without_tokens(call)
    x, run, flat = call.x, step.run, step.flat
    if run is not None and not flat:
        x, flat = run.take(x), is_token_wise(heads)
        if not flat:
            # A projection of the user's own is given rows.
            x = run.aligned(x)
    query, key, value = heads.query_key_value(x)
    token_wise = flat
    if run is not None and not flat and in_pieces(step):
        query, key, value = map(run.flat_heads, (query, key, value))
        flat = True
    # Kept for sinks alone: while gradients are recorded it would take as much memory as the queries.
    unrotated = query if step.rule.num_sinks else None
    position = heads._modules.get("position")
    if position is None:
        position = heads.position
    rotation = position if isinstance(position, Rotation) else None
    if rotation is not None:
        table = step.once(
            ("angles", rotation, key.dtype, flat),
            lambda: rotation.table(
                (step.flat_positions if flat else step.host_positions)
                if step.layout is None
                else _scheme_positions(step, step.layout, flat),
                key,
            ),
        )
        query, key = rotation.rotate_both(query, key, table)
    if step.sequence is not None:
        shared = attend_over_ranks(call, query, key, value, unrotated)
        if shared is not None:
            out, real = heads.out(shared.out), step.sequence.real
            return Attended(out if real is None else out.masked_fill(~real.unsqueeze(-1), 0.0), None, shared.contents)
    if flat and run is not None:
        if use_rows(call, step):
            out, weights, contents = attend_by_row(call, run, SharedHeads(query, key, value, unrotated))
            out = out if token_wise else run.aligned_heads(out)
            return Attended(_projected_out(call, run, out, token_wise), weights, contents)
        key, value = map(run.aligned_heads, (key, value))
    if layer is None:
        view, contents = uncached_view(key, value, step), None
    else:
        view, contents = layer.append(key, value, step, beside_prefix=True)
        if view.prefix is not None and not attends_beside_prefix(call, step, view, query):
            view, contents = layer.append(key, value, step)
    if view.coding is not None and not query.is_cpu:
        view = view.decoded()
    if step.layout is not None and step.layout.position_ids is not None and isinstance(position, ScoreBias):
        placed = step.laid_out_ids(step.layout.position_ids, False)
        view = view._replace(placed=PlacedTokens(placed, placed))
    if flat and run is not None:
        # Where a kernel takes rows as they lie, queries are not laid out.
        if view.prefix is None and (out_of_rows := attend_flat(call, view, query, run)) is not None:
            return Attended(_projected_out(call, run, out_of_rows, flat), None, contents)
        query = run.aligned_heads(query)
        unrotated = None if unrotated is None else run.aligned_heads(unrotated)
    sums = None
    if view.prefix is not None:
        out, weights = attend_beside_prefix(heads.kernel, step, view, query), None
    elif view.coding is None and not isinstance(position, ScoreBias) and _sees_all(call, step, view):
        # Such as a decode step: no mask, no bias, no weights.
        out, weights = heads.kernel(query, view.key, view.value, sink_logits=call.sink_logits, dropout=call.dropout)
    else:
        out, weights, sums = attend_over_view(call, view, query, unrotated)
    if contents is not None and (call.last_queries or call.sums_weights):
        contents = with_observed(call, view, contents, Observation(query, step.new_lengths, sums))
    if flat and run is not None:
        out = run.flat_heads(out)
    out = heads.out(out) if run is None else _projected_out(call, run, out, flat)
    return Attended(out, weights, contents)


def _scheme_positions(step: Step, layout: TokenLayout, flat: bool) -> range | Tensor:
    """Positions of tokens with a layout, flat or aligned, for the scheme."""
    if layout.position_ids is not None:
        return step.laid_out_ids(layout.position_ids, flat)
    return step.flat_positions if flat else step.host_positions


def _projected_out(call: AttentionCall, run: FlatRun, out: Tensor, flat: bool) -> Tensor:
    """Output of the module for heads [B, H, width, D], or flat ones [1, H, N, D], in the layout of the call."""
    out = call.heads.out(out)
    if call.step is not None and call.step.flat:
        return out
    return run.put_back(out if flat else run.flat(out))


def step_after(tokens: Step, contents: CacheContents | None, rule: Rule, expanding_context: bool | None) -> Step:
    """The step of these tokens after the contents of a cache (None: the call begins at position 0).

    Raises ShapeError where the cache has another number of rows.
    """
    state = None if contents is None else contents.state
    if contents is None or state is None:
        return tokens.following(EMPTY, rule, expanding_context)
    layout = compiled_layout(state) if isinstance(state, StaticLayout) else None
    if layout is not None:
        refuse_layout(tokens.layout, "in a compiled step over a frozen layout")
        return layout.plan(tokens, rule, expanding_context)
    if state.buffers.key.shape[0] != tokens.batch:
        contents.check_batch(tokens.batch)
    return tokens.following(state.length, rule, expanding_context)


def _sees_all(call: AttentionCall, step: Step, view: KeyValueView) -> bool:
    """True if there is one query per row, which sees every column of the view, without a given bias and weights."""
    if step.width != 1 or not step.uniform or call.return_weights or call.sums_weights or call.attn_bias is not None:
        return False
    if call.rules is not None:
        return False
    window = step.rule.window
    if view.sink_key is not None or view.first != view.start or (window is not None and view.kept is not None):
        return False
    return len(view.start) == 1 and (window is None or step.past_lengths[0] - view.start[0] < window)


def _without_tokens(call: AttentionCall) -> Attended:
    """Result without a real token: the cache stays as it is, and the output of padding is 0, with a gradient of 0."""
    x, weights = call.x, None
    if call.return_weights:
        cached = 0 if call.layer is None else max(call.layer.contents.row_cached_lengths)
        weights = x.new_zeros(x.shape[0], call.heads.num_heads, x.shape[1], cached + x.shape[1])
    return Attended(x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0.0), weights)
