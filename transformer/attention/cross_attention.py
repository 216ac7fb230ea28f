"""Attention over an external source: no positions, no window, only the source's own padding."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from ..cache import CacheCall, CacheContents, CrossKV, Projections, Written
from ..kernels import Kernel, as_bias, given_bias, is_fully_masked
from ..tracing import is_traced
from .checks import check_attn_bias
from .heads import ProjectedHeads


def cross_attention(
    heads: ProjectedHeads,
    kernel: Kernel,
    call: CacheCall | None,
    written: Written | None,
    x: Tensor,
    real: Tensor | None,
    kv: Tensor,
    kv_real: Tensor | None,
    attn_bias: Tensor | None,
    dropout: float,
    return_weights: bool,
) -> tuple[Tensor, Tensor | None, CacheContents | None]:
    """Output [B, L, E], weights [B, H, L, S] where asked for, and what the cache holds then, where that is new.

    `real` [B, L] and `kv_real` [B, S] are true for tokens, None where all are.
    """
    if attn_bias is not None:
        check_attn_bias(attn_bias, (x.shape[0], heads.num_heads, x.shape[1], kv.shape[1]), x.device)
    query = heads.query(x if real is None else x.masked_fill(~real.unsqueeze(-1), 0.0))
    # While gradients are recorded a source is projected at every call, and none is kept.
    keeps = call is not None and written is not None and not torch.is_grad_enabled()
    source = written.contents.source if keeps and written is not None else None
    generation = None if call is None else call.generation
    known = _known(heads) if keeps else None
    if source is not None and source.key.dtype is query.dtype and source.made_from(kv, kv_real, known, generation):
        kept = source.known_as(kv)
        key, value = kept.key, kept.value
    else:
        kept = None
        clean = kv if kv_real is None else kv.masked_fill(~kv_real.unsqueeze(-1), 0.0)
        key, value = heads.key(clean), heads.value(clean)
    attended, weights = _attend(kernel, query, key, value, kv_real, attn_bias, dropout, return_weights)
    out = heads.out(attended)
    if real is not None:
        out = out.masked_fill(~real.unsqueeze(-1), 0.0)
        weights = None if weights is None else weights.masked_fill(~real[:, None, :, None], 0.0)
    if keeps and kept is None:
        kept = CrossKV.of(key, value, kv, kv_real, known, generation)
    if written is None or written.contents.source is kept:
        return out, weights, None
    return out, weights, written.contents._replace(source=kept)


def _known(heads: ProjectedHeads) -> Projections | None:
    """What decides keys and values of a source; None where that is more than weights: projected anew then.

    A hook may go by anything, such as the scale of an adapter.
    """
    if global_hooks._global_forward_pre_hooks or global_hooks._global_forward_hooks:
        return None
    weights: list[Tensor] = []
    for module in (heads.k_proj, heads.v_proj, heads.k_norm):
        if module is None:
            continue
        plain = module is heads.k_norm or type(module) is nn.Linear
        hooked = module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__
        if not plain or hooked or module._modules:
            return None
        weights += [each for each in (*module._parameters.values(), *module._buffers.values()) if each is not None]
    return None if any(type(weight) not in (nn.Parameter, Tensor) for weight in weights) else tuple(weights)


def _attend(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    attn_bias: Tensor | None,
    dropout: float,
    return_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """`query` [B, H, L, D] over `key`, `value` [B, G, S, D] of which `real` [B, S] are tokens.

    Gives [B, H, L, D] and the weights [B, H, L, S], or None. A query that sees nothing gets exactly 0.
    """
    traced = is_traced(query)
    bias = None if real is None else as_bias(real)[:, None, None, :]
    if attn_bias is not None:
        given = given_bias(attn_bias, query)
        bias = given if bias is None else bias + given
    if bias is None:
        return kernel(query, key, value, dropout=dropout, return_weights=return_weights, traced=traced)
    fully_masked = is_fully_masked(bias)
    bias = bias.masked_fill(fully_masked, 0.0)
    out, weights = kernel(query, key, value, bias, dropout=dropout, return_weights=return_weights, traced=traced)
    out = out.masked_fill(fully_masked, 0.0)
    return out, None if weights is None else weights.masked_fill(fully_masked, 0.0)
