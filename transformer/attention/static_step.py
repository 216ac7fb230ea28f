"""One compiled step over buffers of fixed shape: the same hops as `self_attention`, in tensors alone."""

import torch
from torch import Tensor

from ..cache import CrossKV, StaticLayout
from ..errors import ArgumentError
from ..kernels import Sinks, as_bias, is_fully_masked
from ..masks import Rule, beyond_window, visible
from ..positions import Rotation, ScoreBias
from .call import AttentionCall
from .traced import scored


def static_step(call: AttentionCall, static: StaticLayout, at: Tensor) -> Tensor:
    """`x` [B, L, E] at positions `at` [B, L], after what `static` holds: output [B, L, E], keys and values written.

    Every slot is read, and what is not there to be seen hidden: time goes by the capacity, not by the length.
    """
    heads, x, step = call.heads, call.x, call.step
    if step is None or heads.max_cache_length is None:
        raise RuntimeError("static_step: expected a planned call of a module with max_cache_length")
    position, rule, start = heads.position, step.rule, static.start_at.clone()
    score_bias = position if isinstance(position, ScoreBias) else None
    query, key, value = heads.query(x), heads.key(x), heads.value(x)
    unrotated = query
    if isinstance(position, Rotation):
        table = position.table(at, key)
        query, key = position.rotate(query, table), position.rotate(key, table)
    static.write(key, value, at, rule, heads.max_cache_length)
    buffers = static.buffers
    keys = static.key_positions(start)
    seen = visible(at, keys, Rule(rule.causal, rule.window))
    bias = scored(score_bias, query, at.unsqueeze(-1) - keys.unsqueeze(-2), seen)
    sinks = None
    if buffers.sink_key is not None and buffers.sink_value is not None:
        sink_query = query
        clamped = at if rule.max_sink_distance is None else at.clamp(max=rule.max_sink_distance)
        if isinstance(position, Rotation) and clamped is not at:
            sink_query = position.rotate(unrotated, position.table(clamped, key))
        sink = torch.arange(buffers.sink_key.shape[2], device=x.device)
        sink = sink.where(sink < static.length_at, -1)
        met = beyond_window(at, sink, start, rule)
        sink_bias = scored(score_bias, query, clamped.unsqueeze(-1) - sink.unsqueeze(-2), met)
        sinks = Sinks(sink_query, buffers.sink_key, buffers.sink_value, sink_bias)
    out, _ = heads.kernel(query, buffers.key, buffers.value, bias, sinks=sinks)
    return heads.out(out)


def static_cross_step(call: AttentionCall, source: CrossKV) -> Tensor:
    """`x` [B, L, E] over the keys and values that are kept of `kv`: output [B, L, E].

    That `kv` and its mask are still the same is told by the device; weights are taken to be those of then.
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
    out, _ = heads.kernel(heads.query(call.x), source.key, source.value, bias)
    return heads.out(out if fully_masked is None else out.masked_fill(fully_masked, 0.0))
