"""Attention over an external source: no positions, no window, only the source's own padding."""

from torch import Tensor

from .kernels import Kernel, as_bias, sees_nothing


def attend_source(
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
