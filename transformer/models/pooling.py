"""Pooling of an encoder's states into one vector per row: CLS, mean, last token."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..attention import real_tokens
from ..errors import ArgumentError, ShapeError

PoolingKind = Literal["cls", "mean", "last"]


def pooled(states: Tensor, attention_mask: Tensor | None = None, kind: PoolingKind = "mean") -> Tensor:
    """States [B, L, E] to one vector per row, [B, E]; 0 for a row without a real token.

    "cls": the state of the first real token, "last": of the last one, "mean": the mean of the real tokens' states.

    Raises ShapeError for a mask [B, L] of another shape, and ArgumentError for another kind.
    """
    if not isinstance(states, Tensor):
        raise ArgumentError(f"states: expected a tensor [B, L, E], got {type(states).__name__}")
    if states.ndim != 3:
        raise ShapeError(f"states: expected [B, L, E], got {list(states.shape)}")
    if kind not in _KINDS:
        raise ArgumentError(f"kind: expected one of {tuple(_KINDS)}, got {kind!r:.200}")
    real = real_tokens("attention_mask", attention_mask, states.shape[0], states.shape[1], states.device)
    if real is None:
        real = torch.ones((), dtype=torch.bool, device=states.device).expand(states.shape[:2])
    return _KINDS[kind](states, real)


def mean_pooled(states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Mean of the states of each row's real tokens, as `pooled` with "mean"; raises the same."""
    return pooled(states, attention_mask)


def _first(states: Tensor, real: Tensor) -> Tensor:
    return _mean(states, real & (real.cumsum(1) == 1))


def _last(states: Tensor, real: Tensor) -> Tensor:
    return _mean(states, real & (real.cumsum(1) == real.sum(1, keepdim=True)))


def _mean(states: Tensor, real: Tensor) -> Tensor:
    column = real.unsqueeze(-1)
    return states.masked_fill(~column, 0.0).sum(1) / column.sum(1).clamp(min=1)


_KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cls": _first, "mean": _mean, "last": _last}
