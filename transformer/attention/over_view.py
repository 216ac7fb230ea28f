"""Attention over a view of keys and values: by positions where a kernel reads them, else in blocks with a bias."""

from functools import partial

from torch import Tensor

from ..cache import KeyValueView
from ..kernels import given_bias
from ..positions import Rotation, ScoreBias
from .bias_layout import BiasLayout
from .blockwise import BlockwiseAttention
from .by_positions import attend_by_positions
from .call import AttentionCall
from .observation import summed
from .rules import RulesOverView

OverView = tuple[Tensor, Tensor | None, Tensor | None]
"""Heads [B, H, width, D] of the packed queries, weights [B, H, L, S] of the given ones, or None, and weights
[B, G, n + S] summed over queries and groups, or None."""


def attend_over_view(call: AttentionCall, view: KeyValueView, query: Tensor, unrotated: Tensor | None) -> OverView:
    """Attention of `query` [B, H, width, D] over the tokens that its step's rule shows it. `unrotated` are the queries
    before their rotation, where the rule has sinks."""
    heads, step, position, sink_query = call.heads, call.step, call.heads.position, query
    if step is None:
        raise RuntimeError("attend_over_view: expected a call with a step")
    if unrotated is not None and isinstance(position, Rotation) and view.sink_key is not None and step.rule.window:
        make = partial(position.table, step.sink_query_positions, query)
        sink_query = position.rotate(unrotated, step.once(("sink angles", position, query.dtype), make))
    score_bias = position if isinstance(position, ScoreBias) else None
    attended = attend_by_positions(call, view, query, sink_query, score_bias)
    if attended is not None:
        return attended, None, None
    view, layout, given = view.decoded(), None, None
    if call.attn_bias is not None or call.return_weights:
        layout = BiasLayout(
            step, view, step.past_lengths if call.layer is None else call.layer.contents.row_cached_lengths
        )
    if layout is not None and call.attn_bias is not None:
        given = layout.to_kernel(given_bias(call.attn_bias, query))
    attend = BlockwiseAttention(
        kernel=heads.kernel,
        step=step,
        view=view,
        query=query,
        sink_query=sink_query,
        score_bias=score_bias,
        rules=None if call.rules is None else RulesOverView(call.rules, step, view, heads.num_heads),
        given=given,
        sink_logits=call.sink_logits,
        dropout=call.dropout,
    )
    if call.sums_weights and not call.return_weights:
        out, sums = attend.with_sums()
        return out, None, sums
    out, weights = attend(call.return_weights)
    if weights is None or layout is None:
        return out, None, None
    return out, layout.from_kernel(weights), summed(weights, step, view) if call.sums_weights else None
