"""Compiled step over buffers of fixed shape: the operations of `self_attention`, in tensors alone."""

import torch
from torch import Tensor

from ..cache import CrossKV, StaticLayout, Step
from ..errors import ArgumentError
from ..kernels import Sinks, as_bias, is_fully_masked
from ..masks import beyond_window
from ..positions import Rotation
from .call import Arguments, AttentionCall
from .cross_attention import cross_call
from .heads import CachedHeads
from .layouts import refuse_layout
from .traced import scored, window_bias


def compiled_call(heads: CachedHeads, x: Tensor, given: Arguments, step: Step | None) -> Tensor:
    """The output [B, L, E] of a call that is being compiled, over a frozen layout; `step` is None with `kv`.

    Raises ArgumentError for arguments that a compiled step does not take.
    """
    cache, kv = heads.slot.cache, given.kv
    static = None if cache is None else cache.static
    source = None if cache is None else cache.static_source
    refuse_layout(given.layout, "in a compiled step over a frozen layout")
    if given.attention_mask is not None or given.attn_bias is not None or given.return_weights or heads.training:
        raise ArgumentError(
            "compiled steps over a frozen layout take x, kv, kv_mask, expanding_context and step, in eval(); "
            "for other masks, biases and weights call the module as it is"
        )
    if kv is not None and source is not None:
        return static_cross_step(cross_call(heads, x, kv, given), source)
    if kv is not None or static is None or step is None or step.at is None or heads.max_cache_length is None:
        raise ArgumentError(
            "compiled steps continue the cache as it was when frozen: expected kv where it had a "
            "source, else tokens, and a step planned in the same call; freeze_layout() after the first eager call"
        )
    call = AttentionCall(heads=heads, x=x, step=step, rules=heads.rules, sink_logits=heads.sink_logits)
    return static_step(call, static, step.at)


def static_step(call: AttentionCall, static: StaticLayout, at: Tensor) -> Tensor:
    """`x` [B, L, E] at positions `at` [B, L], after the tokens in `static`: output [B, L, E], keys and values written.

    Every slot is read, and slots without a visible token are hidden: time depends on the capacity, not on the length.
    """
    heads, x, step, logits = call.heads, call.x, call.step, call.sink_logits
    if step is None or heads.max_cache_length is None:
        raise RuntimeError("static_step: expected a planned call of a module with max_cache_length")
    position, rule, start = heads.position, step.rule, static.start_at.clone()
    query, key, value = heads.query_key_value(x)
    unrotated = query
    if isinstance(position, Rotation):
        table = position.table(at, key)
        query, key = position.rotate(query, table), position.rotate(key, table)
    static.write(key, value, at, rule, heads.max_cache_length)
    keys = static.key_positions(start)
    bias, rules = window_bias(position, query, at, keys, rule), call.rules
    bias = bias if rules is None else rules.masked(bias, at, keys, heads.num_heads)
    change = None if rules is None else rules.change(at, keys)
    sinks, sink_bias, stored_sinks = None, None, static.sinks()
    if stored_sinks is not None:
        sink_query = query
        clamped = at if rule.max_sink_distance is None else at.clamp(max=rule.max_sink_distance)
        if isinstance(position, Rotation) and clamped is not at:
            sink_query = position.rotate(unrotated, position.table(clamped, key))
        sink = torch.arange(stored_sinks[0].shape[2], device=x.device)
        sink = sink.where(sink < static.length_at, -1)
        sink_mask = beyond_window(at, sink, start, rule)
        sink_bias, sink_change = scored(position, query, clamped, sink, sink_mask), None
        if rules is not None:
            sink_bias = rules.masked(sink_bias, at, sink, heads.num_heads)
            sink_change = rules.change(at, sink)
        sinks = Sinks(sink_query, *stored_sinks, sink_bias, sink_change)
    if rules is None:
        return heads.out(heads.kernel(query, *static.keys_and_values(), bias, sinks=sinks, sink_logits=logits)[0])
    # A rule may hide all keys of a query, which the kernel only expects where scores are changed.
    fully_masked = is_fully_masked(bias, sink_bias)
    if change is None:
        bias = bias.masked_fill(fully_masked, 0.0)
    out, _ = heads.kernel(query, *static.keys_and_values(), bias, sinks=sinks, change=change, sink_logits=logits)
    return heads.out(out.masked_fill(fully_masked, 0.0))


def static_cross_step(call: AttentionCall, source: CrossKV) -> Tensor:
    """`x` [B, L, E] over the keys and values that are kept of `kv`: output [B, L, E].

    The device checks that `kv` and its mask are the same; the weights are taken to be unchanged.
    """
    heads, kv, kv_real, kept, mask = call.heads, call.kv, call.kv_real, source.kv, source.mask
    if kv is None or kept is None or kept.tensor.shape != kv.shape or (mask is None) != (kv_real is None):
        raise ArgumentError(
            "kv, kv_mask: expected those that were there when the layout was frozen; freeze_layout() anew"
        )
    same = kv == kept.tensor
    if mask is not None and kv_real is not None:
        same = (same | ~kv_real.unsqueeze(-1)) & (kv_real == mask.tensor).unsqueeze(-1)
    torch._assert_async(
        same.all(), "kv: changed since the layout was frozen; freeze_layout() anew after an eager call with it"
    )
    bias = None if kv_real is None else as_bias(kv_real)[:, None, None, :]
    fully_masked = None if bias is None else is_fully_masked(bias)
    if bias is not None and fully_masked is not None:
        bias = bias.masked_fill(fully_masked, 0.0)
    out, _ = heads.kernel(heads.query(call.x), *source.keys_and_values(), bias, sink_logits=call.sink_logits)
    return heads.out(out if fully_masked is None else out.masked_fill(fully_masked, 0.0))
