"""Signatures of the attention modules for type checkers: options of the constructors, and both results of a call."""

from collections.abc import Callable
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor, nn

from ..cache import AnyPolicy, Step
from ..codecs import CacheDtypes
from ..positions import Rotation, ScoreBias
from .rules import MaskRule, ScoreRule


class AttentionKeywords(TypedDict, total=False):
    """Options that the three attention modules share, as keywords; `Attention` says what they mean."""

    head_dim: int | None
    kv_dim: int | None
    bias: bool
    out_bias: bool | None
    dropout: float
    position: Rotation | ScoreBias | None
    window_size: int | None
    num_sinks: int
    qk_norm: nn.Module | Callable[[int], nn.Module] | None
    qk_norm_per_head: bool
    scale: float | None
    softcap: float | None
    sink_logits: bool
    max_cache_length: int | None
    cache_dtype: CacheDtypes
    cache_budget: tuple[int, AnyPolicy] | None
    mask_rule: MaskRule | None
    score_rule: ScoreRule | None
    device: torch.device | str | None
    dtype: torch.dtype | None


@overload
def attention_call(
    self: Any,
    x: Tensor,
    kv: Tensor | None = None,
    expanding_context: bool | None = None,
    *,
    attention_mask: Tensor | None = None,
    kv_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    return_weights: Literal[False] = False,
    positions: Tensor | None = None,
    step: Step | None = None,
) -> Tensor: ...


@overload
def attention_call(
    self: Any,
    x: Tensor,
    kv: Tensor | None = None,
    expanding_context: bool | None = None,
    *,
    attention_mask: Tensor | None = None,
    kv_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    return_weights: Literal[True],
    positions: Tensor | None = None,
    step: Step | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def attention_call(
    self: Any,
    x: Tensor,
    kv: Tensor | None = None,
    expanding_context: bool | None = None,
    *,
    attention_mask: Tensor | None = None,
    kv_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    return_weights: bool,
    positions: Tensor | None = None,
    step: Step | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def attention_call(self: Any, x: Tensor, *arguments: Any, **keywords: Any) -> Any:
    """`Attention.forward`, to type checkers: with `return_weights` the weights come too."""
    return self(x, *arguments, **keywords)
