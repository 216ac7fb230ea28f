"""Reference: attention in plain operations, the truth for the other kernels, and the one that serves every call.

No size decides what it does, so a traced call that SDPA cannot serve takes it too: one graph for every length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .biases import causal_bias, changed_scores
from .inputs import AttentionInputs, Sinks, upcast
from .sink_logits import softmax_of_scores


def reference_attention(
    inputs: AttentionInputs,
    scale: float,
    softcap: float | None = None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, L, D], and weights [B, H, L, n + S] (sinks first) before dropout; computed in at least float32.

    `causal=True` is for L queries that are the last of the S keys. A query whose keys are all hidden gives NaN; with a
    change of scores or beside sink logits it gives 0.
    """
    key, value, sinks = inputs.key, inputs.value, inputs.sinks
    if causal:
        inputs = inputs._replace(bias=causal_bias(inputs.query, key, inputs.bias))
    scores = _scores(inputs, scale, softcap)
    if sinks is not None:
        scores = torch.cat((_scores(sinks, scale, softcap), scores), -1)
        value = torch.cat((sinks.value, value), 2)
    logits = inputs.sink_logits
    if logits is not None:
        logits = logits.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = softmax_of_scores(scores, inputs.change is not None, logits)
    dropped = F.dropout(weights, dropout) if dropout else weights
    out = torch.einsum("bgrls,bgsd->bgrld", _by_group(dropped, key), upcast(value)).flatten(1, 2)
    return out.to(inputs.query.dtype), weights.to(inputs.query.dtype)


def _scores(inputs: AttentionInputs | Sinks, scale: float, softcap: float | None) -> Tensor:
    """Scaled, capped, changed and biased scores [B, H, L, S]."""
    query, key, bias = inputs.query, inputs.key, inputs.bias
    scores = torch.einsum("bgrld,bgsd->bgrls", _by_group(upcast(query) * scale, key), upcast(key)).flatten(1, 2)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if inputs.change is not None:
        return changed_scores(scores, inputs.change, bias)
    return scores if bias is None else scores + bias.to(scores.dtype)


def _by_group(x: Tensor, key: Tensor) -> Tensor:
    """`x` [B, H, L, n] as [B, G, H / G, L, n]: a length that is a symbol stays a dimension of its own."""
    grouped: Tensor = x.unflatten(1, (key.shape[1], -1))  # type: ignore[no-untyped-call]
    return grouped
