"""Attention over an external source: no positions, no window, only the source's own padding."""

from torch import Tensor

from ..cache import LayerCache, Source, versions
from .checks import check_attn_bias
from .heads import ProjectedHeads
from .kernels import Kernel, as_bias, sees_nothing


def cross_attention(
    heads: ProjectedHeads,
    kernel: Kernel,
    cache: LayerCache | None,
    x: Tensor,
    real: Tensor | None,
    kv: Tensor,
    kv_real: Tensor | None,
    attn_bias: Tensor | None,
    dropout: float,
    return_weights: bool,
) -> tuple[Tensor, Tensor | None, Source | None]:
    """Output [B, L, E], weights [B, H, L, S] where asked for, and the source to keep where it was projected anew.

    `real` [B, L] and `kv_real` [B, S] are true for tokens, None where all are.
    """
    if attn_bias is not None:
        check_attn_bias(attn_bias, (x.shape[0], heads.num_heads, x.shape[1], kv.shape[1]), x.device)
    query = heads.query(x if real is None else x.masked_fill(~real.unsqueeze(-1), 0.0))
    weights_now = None if cache is None else versions((heads.k_proj, heads.v_proj, heads.k_norm))
    source = None if cache is None else cache.source_made_from(kv, kv_real, weights_now)
    if source is not None and source.key.dtype is not query.dtype:
        source = None  # kept in the dtype of another autocast
    if source is not None:
        key, value = source.key, source.value
    else:
        clean = kv if kv_real is None else kv.masked_fill(~kv_real.unsqueeze(-1), 0.0)
        key, value = heads.key(clean), heads.value(clean)
    attended, weights = _attend(kernel, query, key, value, kv_real, attn_bias, dropout, return_weights)
    out = heads.out(attended)
    if real is not None:
        out = out.masked_fill(~real.unsqueeze(-1), 0.0)
        weights = None if weights is None else weights.masked_fill(~real[:, None, :, None], 0.0)
    projected = None
    if cache is not None and source is None:
        projected = Source.of(key, value, kv, kv_real, weights_now)
    return out, weights, projected


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
    bias = None if real is None else as_bias(real)[:, None, None, :]
    if attn_bias is not None:
        given = as_bias(attn_bias)
        bias = given if bias is None else bias + given
    if bias is None:
        return kernel(query, key, value, dropout=dropout, return_weights=return_weights)
    blind = sees_nothing(bias)
    out, weights = kernel(
        query, key, value, bias.masked_fill(blind, 0.0), dropout=dropout, return_weights=return_weights
    )
    out = out.masked_fill(blind, 0.0)
    return out, None if weights is None else weights.masked_fill(blind, 0.0)
