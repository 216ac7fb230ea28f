"""Sink logits: a learned logit of each head that takes a share of the attention and gives no value.

It joins the denominator of the softmax alone (GPT-OSS, arXiv 2508.10925): the output is attention without it, times
`sigmoid(lse - logit)`, where `lse` is the log-sum-exp of the scores. Unlike the sinks of a window it is no token.
"""

import torch
from torch import Tensor

from .biases import changed_weights
from .few_queries import attend_few


def softmax_of_scores(scores: Tensor, changed: bool, logits: Tensor | None) -> Tensor:
    """The weights of scores [..., L, S], beside `logits` [..., L, 1] if there are any.

    Those of a query whose every key is hidden are 0 with `changed` scores, and beside logits.
    """
    if logits is not None:
        return torch.softmax(torch.cat((scores, logits.to(scores.dtype)), -1), -1)[..., :-1]
    return changed_weights(scores) if changed else torch.softmax(scores, -1)


def attend_beside(
    logits: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    softcap: float | None,
    causal: bool,
) -> Tensor:
    """`attend_few` of `query` [B, H, L, D] beside a logit of each head [H], if there are any: [B, H, L, D]."""
    if logits is None:
        return attend_few(query, key, value, scale, softcap=softcap, causal=causal)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device="cpu")
    out = attend_few(query.float(), key, value, scale, softcap=softcap, causal=causal, lse=lse)
    return (out * torch.sigmoid(lse - logits.float().unsqueeze(-1)).unsqueeze(-1)).to(query.dtype)
