"""Attention over an external source: no positions, no window, only the source's own padding."""

from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from ..cache import CachedLayer, CrossKV, Generation, Projections, Step
from ..codecs import Coding
from ..errors import ArgumentError
from ..kernels import Positioned, Positions, as_bias, by_positions, given_bias, is_fully_masked, reads_positions
from ..plain import HasPlainWeights
from ..tracing import is_traced
from . import checks
from .call import Arguments, Attended, AttentionCall
from .heads import CachedHeads
from .layouts import refuse_layout
from .rules import Rules


def cross_call(
    heads: CachedHeads,
    x: Tensor,
    kv: Tensor,
    given: Arguments,
    *,
    layer: CachedLayer | None = None,
    dropout: float = 0.0,
    generation: Generation | None = None,
) -> AttentionCall:
    """A call over the source `kv`, checked. Raises as `Attention.forward` where the arguments do not fit."""
    step = given.step
    batch, tokens = x.shape[:2]
    check_no_rules(heads.rules)
    if given.layout is not None:
        refuse_layout(given.layout, "with kv; cross-attention has no positions")
    if step is not None:
        if type(step) is not Step or not step.flat or given.attn_bias is not None:
            raise ArgumentError("step: expected None with kv, or a flat run's; cross-attention has no positions")
        checks.check_step_alone(step, given.expanding_context, given.attention_mask)
        checks.check_shape_of_step(step, x)
        if step.packed:
            raise ArgumentError("segment_ids: expected None in blocks that read a source, which belongs to whole rows")
        batch, tokens = step.batch, step.tokens
    real = checks.real_tokens("attention_mask", given.attention_mask, batch, tokens, x.device)
    checks.check_source(kv, batch, heads.kv_dim, checks.weight_of(heads.k_proj), heads.apply_causal_mask)
    kv_real = checks.real_tokens("kv_mask", given.kv_mask, kv.shape[0], kv.shape[1], kv.device)
    if given.attn_bias is not None:
        shape = batch, heads.num_heads, tokens, kv.shape[1]
        checks.check_attn_bias(given.attn_bias, shape, x.device)
    return AttentionCall(
        heads=heads,
        x=x,
        layer=layer,
        attn_bias=given.attn_bias,
        dropout=dropout,
        return_weights=given.return_weights,
        step=step,
        kv=kv,
        real=real,
        kv_real=kv_real,
        sink_logits=heads.sink_logits,
        generation=generation,
    )


def check_no_rules(rules: Rules | None) -> None:
    """Raises ArgumentError for rules of positions, which a source does not have."""
    if rules is not None:
        raise ArgumentError(
            "kv: expected None for a module with a mask_rule or a score_rule, which are functions of positions, got a "
            "source, whose tokens have none; give attn_bias to that call, or use a module without rules"
        )


def cross_attention(call: AttentionCall) -> Attended:
    """Output, weights where asked for, and the contents of the cache after the call, where they are new."""
    heads, layer, x, kv = call.heads, call.layer, call.x, call.kv
    real, kv_real, generation = call.real, call.kv_real, call.generation
    if kv is None:
        raise RuntimeError("cross_attention: expected a call with kv")
    query = heads.query(x if real is None else x.masked_fill(~real.unsqueeze(-1), 0.0))
    run = None if call.step is None else call.step.run
    if run is not None:
        query = run.aligned_heads(query)
    # While gradients are recorded a source is projected in every call, and none is kept.
    keeps = layer is not None and not torch.is_grad_enabled()
    source = layer.contents.source if keeps and layer is not None else None
    known = _known(heads) if keeps else None
    if source is not None and source.dtype is query.dtype and source.made_from(kv, kv_real, known, generation):
        kept = source.known_as(kv)
    else:
        key, value = project_source(heads, kv, kv_real)
        kept = None
        if keeps and layer is not None:
            coding = layer.cache.spec.coding(key.dtype)
            kept = CrossKV.of(key, value, kv, kv_real, known, generation, coding)
    if kept is None:
        attended, weights = attend_to_source(call, query, key, value)
    else:
        attended, weights = attend_to_source(call, query, kept.key, kept.value, kept.coding)
    out = heads.out(attended if run is None else run.flat_heads(attended))
    if run is not None and weights is not None:
        weights = run.given_queries(weights)
    if real is not None:
        out = out.masked_fill(~real.unsqueeze(-1), 0.0)
        weights = None if weights is None else weights.masked_fill(~real[:, None, :, None], 0.0)
    if kept is None or layer is None or layer.contents.source is kept:
        return Attended(out, weights)
    return Attended(out, weights, layer.contents._replace(source=kept))


def project_source(heads: CachedHeads, kv: Tensor, kv_real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, S, D] of a source `kv` [B, S, kv_dim], whose padding (`kv_real` false) counts as 0."""
    clean = kv if kv_real is None else kv.masked_fill(~kv_real.unsqueeze(-1), 0.0)
    return heads.key_value(clean)


def _known(heads: CachedHeads) -> Projections | None:
    """The weights that decide keys and values of a source; None where more than weights does: projected anew then.

    A hook may depend on anything, such as the scale of an adapter.
    """
    if global_hooks._global_forward_pre_hooks or global_hooks._global_forward_hooks:
        return None
    weights: list[Tensor] = []
    for module in (heads.k_proj, heads.v_proj, heads.k_norm):
        if module is None:
            continue
        hooked = module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__
        if hooked or module._modules:
            return None
        if isinstance(module, HasPlainWeights):
            weights += module.plain_weights()
            continue
        if module is not heads.k_norm and type(module) is not nn.Linear:
            return None
        weights += [each for each in (*module._parameters.values(), *module._buffers.values()) if each is not None]
    return None if any(type(weight) not in (nn.Parameter, Tensor) for weight in weights) else tuple(weights)


def _whole_source(length: int) -> Positioned:
    """What says that every query sees a whole source."""
    return Positioned(Positions(first=(0,), start=(0,), end=(length,), past=(0,), causal=False))


class _Options(TypedDict):
    sink_logits: Tensor | None
    dropout: float
    return_weights: bool
    traced: bool


def attend_to_source(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, coding: Coding | None = None
) -> tuple[Tensor, Tensor | None]:
    """`query` [B, H, L, D] over `key`, `value` [B, G, S, D]: [B, H, L, D], and weights [B, H, L, S] or None.

    A query that sees no key gets exactly 0. With a `coding` keys and values are records.
    """
    if coding is not None:
        plain = call.kv_real is None and call.attn_bias is None and not (call.return_weights or call.dropout)
        if plain and call.sink_logits is None and reads_positions(call.heads.kernel, query, key, value, coding):
            return by_positions(call.heads.kernel, query, key, value, _whole_source(key.shape[2]), coding), None
        key, value = coding.decoded(key, value)
    bias = None if call.kv_real is None else as_bias(call.kv_real)[:, None, None, :]
    if call.attn_bias is not None:
        given = given_bias(call.attn_bias, query)
        bias = given if bias is None else bias + given
    options: _Options = {
        "sink_logits": call.sink_logits,
        "dropout": call.dropout,
        "return_weights": call.return_weights,
        "traced": is_traced(query),
    }
    if bias is None:
        return call.heads.kernel(query, key, value, **options)
    fully_masked = is_fully_masked(bias)
    out, weights = call.heads.kernel(query, key, value, bias.masked_fill(fully_masked, 0.0), **options)
    out = out.masked_fill(fully_masked, 0.0)
    return out, None if weights is None else weights.masked_fill(fully_masked, 0.0)
