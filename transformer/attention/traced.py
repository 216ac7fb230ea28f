"""Self-attention of a traced call without a cache: the operations of `self_attention`, in tensors alone.

Nothing is packed, and no choice depends on a length: positions are the running sum of the mask, visibility is one
boolean mask, so one graph serves every length and every mask. Padding is masked, and its output set to 0. Biases and
sinks of keys at positions that the device alone knows serve the steps over buffers too.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import EMPTY, Step, TokenLayout, active_sequence
from ..kernels import Sinks, as_bias, given_bias, is_fully_masked, scores_dtype
from ..masks import Rule, beyond_window, visible
from ..positions import Rotation, ScoreBias
from .call import Attended, AttentionCall
from .checks import check_step
from .heads import CachedHeads
from .layouts import check_serves, tokens_of
from .rules import Rules
from .shared_plan import check_not_shared

Position = Rotation | ScoreBias | None


def traced_step(
    heads: CachedHeads, x: Tensor, mode: bool | None, attention_mask: Tensor | None, layout: TokenLayout | None = None
) -> Step:
    """The step of a traced call without a cache, in the mode `expanding_context`."""
    check_not_shared(active_sequence((heads,)))
    tokens, rule = tokens_of(x, attention_mask, layout), heads.traced_rule(mode)
    check_serves(heads, tokens, rule, None, False)
    return tokens.following(EMPTY, rule, mode)


def given_traced_step(heads: CachedHeads, x: Tensor, step: Step) -> Step:
    """The given step in a traced call: as it is, or anew where it was planned outside of what is traced."""
    rule = heads.traced_rule(step.expanding_context)
    if step.traced:
        check_step(step, x, rule, False, True)
        return step
    # Its numbers would make one graph for each length.
    tokens = Step.traced_of(x, step.real, step.layout)
    check_serves(heads, tokens, rule, None, False)
    return tokens.following(EMPTY, rule, step.expanding_context)


def traced_attention(call: AttentionCall) -> Attended:
    """Output [B, L, E], and weights [B, H, L, L] where asked for."""
    heads, x, step = call.heads, call.x, call.step
    if step is None or step.at is None:
        raise RuntimeError("traced_attention: expected a traced step")
    real, at, rule, position = step.real, step.at, step.rule, heads.position
    options: Any = {"dropout": call.dropout, "return_weights": call.return_weights, "traced": True}
    options["sink_logits"] = call.sink_logits
    if real is not None:
        x = x.masked_fill(~real.unsqueeze(-1), 0.0)
    query, key, value = heads.query_key_value(x)
    unrotated = query
    if isinstance(position, Rotation):
        table = position.table(at if step.position_ids is None else step.position_ids, key)
        query, key = position.rotate(query, table), position.rotate(key, table)
    given = None if call.attn_bias is None else given_bias(call.attn_bias, query)
    rules = call.rules
    plain = real is None and given is None and rules is None and step.layout is None and rule.window is None
    if plain and not isinstance(position, ScoreBias):
        out, weights = heads.kernel(query, key, value, causal=rule.causal, **options)
        return Attended(heads.out(out), weights)
    bias = window_bias(position, query, at, at, rule) if step.layout is None else _laid_out_bias(call, step, at, query)
    bias = bias if given is None else bias + given
    bias = bias if rules is None else rules.masked(bias, at, at, heads.num_heads)
    apart = None
    # Compilers take no length for 0 that was not, so this fixes none.
    if rule.window is not None and rule.num_sinks and x.shape[1] > 0:
        apart = sinks_apart(position, unrotated, PositionedKeys(key, value, at), at, rule, given, rules=rules)
    # A fully masked query gets finite scores first and an output of 0 then: its gradients stay finite.
    fully_masked = is_fully_masked(bias, None if apart is None else apart.sinks.bias)
    change = None if rules is None else rules.change(at, at)
    if change is None:
        bias = bias.masked_fill(fully_masked, 0.0)
    sinks = None if apart is None else apart.sinks
    out, weights = heads.kernel(query, key, value, bias, sinks=sinks, change=change, **options)
    out = heads.out(out.masked_fill(fully_masked, 0.0))
    if real is not None:
        out = out.masked_fill(~real.unsqueeze(-1), 0.0)
    if weights is not None:
        weights = weights.masked_fill(fully_masked if real is None else fully_masked | ~real[:, None, :, None], 0.0)
        weights = weights if apart is None else apart.with_columns(weights)
    return Attended(out, weights)


class PositionedKeys(NamedTuple):
    """Keys and values [B, G, S, D], and the position of each, int64 [1 or B, S]."""

    key: Tensor
    value: Tensor
    at: Tensor


class SinksApart(NamedTuple):
    """Sinks beyond the window, and the column int64 [B, n] of each."""

    sinks: Sinks
    column: Tensor

    def with_columns(self, weights: Tensor) -> Tensor:
        """Weights [B, H, L, n + L] (sinks first) with each sink's added to its own column: [B, H, L, L]."""
        number = self.column.shape[1]
        apart, own = weights[..., :number], weights[..., number:]
        column = self.column[:, None, None, :].expand(apart.shape)
        return own.scatter_add(3, column, apart)


def sinks_apart(
    position: Position,
    unrotated: Tensor,
    keys: PositionedKeys,
    at: Tensor,
    rule: Rule,
    given: Tensor | None = None,
    *,
    rules: Rules | None,
) -> SinksApart:
    """The first `num_sinks` tokens of each row, in any column, for queries [B, H, L, D] at positions `at` [1 or B, L].

    Queries `unrotated` are rotated to positions clamped to the rule's `max_sink_distance`. `given`: the caller's bias;
    `rules`: those of the module.
    """
    key, value = keys.key, keys.value
    batch = key.shape[0]
    sink = torch.arange(rule.num_sinks, device=key.device)
    found = (keys.at.unsqueeze(-2) == sink.unsqueeze(-1)).expand(batch, -1, -1)
    # A row that is shorter than the sinks has none there: another column takes its place, and is not visible.
    column = found.long().argmax(-1)
    sink = sink.where(found.any(-1), -1)
    # gather: take_along_dim would compare the lengths, and so fix them.
    place = column[:, None, :, None].expand(batch, key.shape[1], rule.num_sinks, key.shape[3])
    sink_key, sink_value = key.gather(2, place), value.gather(2, place)
    clamped = at if rule.max_sink_distance is None else at.clamp(max=rule.max_sink_distance)
    query = unrotated
    if isinstance(position, Rotation):
        query = position.rotate(unrotated, position.table(clamped, key))
    mask = beyond_window(at, sink, torch.zeros_like(at[:, :1]), rule)
    bias = scored(position, query, clamped, sink, mask)
    if given is not None:
        given = given.view((1,) * (4 - given.ndim) + given.shape).expand(batch, -1, -1, key.shape[2])
        place = column[:, None, None, :].expand(*given.shape[:3], rule.num_sinks)
        bias = bias + given.gather(3, place)
    change = None
    if rules is not None:
        bias, change = rules.masked(bias, at, sink, unrotated.shape[1]), rules.change(at, sink)
    return SinksApart(Sinks(query, sink_key, sink_value, bias, change), column)


def window_bias(position: Position, query: Tensor, at: Tensor, key_at: Tensor, rule: Rule) -> Tensor:
    """Bias of scores of queries at `at` [1 or B, L] and keys at `key_at` [1 or B, S], -inf outside of the rule's causal
    order and window: broadcasts to [B, H, L, S]. Sinks come in addition, from `sinks_apart`."""
    return scored(position, query, at, key_at, visible(at, key_at, Rule(rule.causal, rule.window)))


def _laid_out_bias(call: AttentionCall, step: Step, at: Tensor, query: Tensor) -> Tensor:
    """As `window_bias`, of tokens with a layout: documents, a prefix, or positions of the caller."""
    layout, rule = step.layout or TokenLayout(), step.rule
    mask = visible(at, at, Rule(rule.causal, rule.window), layout.prefix_lengths)
    if layout.segment_ids is not None:
        mask = mask & layout.same_document(layout.segment_ids)
    placed = at if layout.position_ids is None else layout.position_ids
    return scored(call.heads.position, query, placed, placed, mask)


def scored(position: Position, query: Tensor, at: Tensor, key_at: Tensor, mask: Tensor) -> Tensor:
    """Bias of the position scheme between positions [1 or B, L] and [1 or B, S], -inf where `mask` [1 or B, L, S] is
    false: broadcasts to [B, H, L, S]."""
    if not isinstance(position, ScoreBias):
        return as_bias(mask.unsqueeze(-3))
    distance = at.unsqueeze(-1) - key_at.unsqueeze(-2)
    return position.bias_for(distance, scores_dtype(query)).masked_fill(~mask.unsqueeze(-3), float("-inf"))
