"""Reference: attention in plain operations, the truth for the other kernels, and the one that serves every call.

No size decides what it does, so a traced call that SDPA cannot serve takes it too: one graph for every length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .biases import causal_bias
from .inputs import AttentionInputs, upcast


def reference_attention(
    inputs: AttentionInputs,
    scale: float,
    softcap: float | None = None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, L, D], and weights [B, H, L, n + S] (sinks first) before dropout; computed in at least float32.

    `causal=True` is for L queries that are the last of the S keys. A query whose keys are all hidden gives NaN.
    """
    query, key, value, bias, sinks = inputs
    if causal:
        bias = causal_bias(query, key, bias)
    scores = _scores(query, key, bias, scale, softcap)
    if sinks is not None:
        scores = torch.cat((_scores(sinks.query, sinks.key, sinks.bias, scale, softcap), scores), -1)
        value = torch.cat((sinks.value, value), 2)
    weights = torch.softmax(scores, -1)
    dropped = F.dropout(weights, dropout) if dropout else weights
    out = torch.einsum("bgrls,bgsd->bgrld", _by_group(dropped, key), upcast(value)).flatten(1, 2)
    return out.to(query.dtype), weights.to(query.dtype)


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Scaled, capped and biased scores [B, H, L, S]."""
    scores = torch.einsum("bgrld,bgsd->bgrls", _by_group(upcast(query) * scale, key), upcast(key)).flatten(1, 2)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return scores if bias is None else scores + bias.to(scores.dtype)


def _by_group(x: Tensor, key: Tensor) -> Tensor:
    """`x` [B, H, L, n] as [B, G, H / G, L, n]: a length that is a symbol stays a dimension of its own."""
    grouped: Tensor = x.unflatten(1, (key.shape[1], -1))  # type: ignore[no-untyped-call]
    return grouped
