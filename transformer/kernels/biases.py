"""Biases of scores: masks as numbers, a caller's bias, and the dtype in which scores are added.

One rule holds for every kernel, dtype and device: -inf alone hides a key, and a finite number stays finite. Biases are
formed and added in at least float32, so a query with nothing but very low numbers attends to its keys alike, as the
same sum in float64 would have it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

HIDDEN = float("-inf")

HALF_DTYPES = (torch.float16, torch.bfloat16)

ScoreChange = Callable[[Tensor], Tensor]
"""A function of scaled and capped scores [B, H, L, S]. What it makes of the score of a hidden key does not count."""


def as_bias(visible: Tensor) -> Tensor:
    """A mask, bool (true: visible), as a float32 bias: 0 or -inf. Of at least one dimension."""
    if visible.ndim == 0:
        # A number alone would be rounded to the dtype of what it is added to.
        visible = visible.unsqueeze(0)
    zeros = torch.zeros((), dtype=torch.float32, device=visible.device).expand(visible.shape)
    return zeros.masked_fill(~visible, HIDDEN)


def given_bias(given: Tensor, query: Tensor) -> Tensor:
    """A caller's mask or float bias for these queries [B, H, L, D]: at least float32, and of at least one dimension."""
    if given.dtype == torch.bool:
        return as_bias(given)
    if given.ndim == 0:
        given = given.unsqueeze(0)
    if given.dtype not in (torch.float32, torch.float64):
        given = given.float()
    added = scores_dtype(query) if takes_float32_bias(query) else query.dtype
    if torch.finfo(added).max >= torch.finfo(given.dtype).max:
        return given
    # Half of the largest number: what a position scheme adds then leaves it finite.
    largest = torch.finfo(added).max / 2
    return given.clamp(-largest, largest).masked_fill(given == HIDDEN, HIDDEN).float()


def takes_float32_bias(query: Tensor) -> bool:
    """Whether SDPA adds a float32 bias to the scores of 16-bit queries as it is: on the CPU.

    Elsewhere it takes one of their dtype alone; so do the runtimes of exported graphs, such as ONNX.
    """
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return query.is_cpu and not exporting


def scores_dtype(query: Tensor) -> torch.dtype:
    """The dtype of the scores of these queries: float64 for float64, else float32."""
    return torch.float64 if query.dtype is torch.float64 else torch.float32


def causal_bias(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """Causal order of `query` [B, H, L, D] that ends `key` [B, G, S, D]: -inf for what follows a query, plus `bias`.

    float32 [L, S] without a bias.
    """
    new, keys = query.shape[2], key.shape[2]
    order = torch.full((new, keys), HIDDEN, dtype=torch.float32, device=query.device).triu(1 + keys - new)
    return order if bias is None else bias + order


def is_fully_masked(bias: Tensor, sink_bias: Tensor | None = None) -> Tensor:
    """True for queries whose every key is hidden, bool [..., L, 1]."""
    fully_masked = (bias == HIDDEN).all(-1, keepdim=True)
    return fully_masked if sink_bias is None else fully_masked & (sink_bias == HIDDEN).all(-1, keepdim=True)


def changed_scores(scores: Tensor, change: ScoreChange, bias: Tensor | None) -> Tensor:
    """Scores [B, H, L, S] after a change, plus a bias: -inf there hides a key, whatever the change made of it."""
    scores = change(scores)
    return scores if bias is None else (scores + bias.to(scores.dtype)).masked_fill(bias == HIDDEN, HIDDEN)


def changed_weights(scores: Tensor) -> Tensor:
    """The softmax over changed scores; 0 for a query whose every key is hidden, with gradients of 0."""
    fully_masked = (scores == HIDDEN).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(fully_masked, 0.0), -1).masked_fill(fully_masked, 0.0)


def bias_by_group(bias: Tensor, groups: int, per_group: int) -> Tensor:
    """A bias that broadcasts to [B, H, L, S] as one of five dimensions that broadcasts to [B, G, H / G, L, S]."""
    bias = bias.view((1,) * (4 - bias.ndim) + bias.shape)
    if bias.shape[1] == 1:
        return bias.unsqueeze(1)
    return bias.view(bias.shape[0], groups, per_group, *bias.shape[2:])
