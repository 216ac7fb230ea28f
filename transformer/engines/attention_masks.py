"""Masks of the engines' modules: one for full attention, and one for each distinct window."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ..errors import ShapeError

FULL, SLIDING = "full_attention", "sliding_attention"
"""Words of `layer_types`. A window that is narrower than the widest has a word of its own, with its size."""

Masks = Mapping[str, Any]


def mask_word(window: int | None, widest: int | None) -> str:
    """The word of a layer's mask; `widest` is the `sliding_window` of the configuration, for which caches are made."""
    if window is None:
        return FULL
    return SLIDING if window == widest else f"{SLIDING}_{window}"


def masks_of(
    config: PreTrainedConfig,
    words: Mapping[str, int | None],
    inputs_embeds: Tensor,
    attention_mask: Tensor | Masks | None,
    cache: Cache | None,
    position_ids: Tensor | None,
) -> Masks:
    """The mask of each word; `words` gives its window.

    `attention_mask` is [B, S] over the cached tokens and the new ones, a mask [B, 1, L, S] for all layers, or masks
    that are made already. The masks' form is that of the attention implementation, None where it needs none.
    """
    if isinstance(attention_mask, Mapping):
        return attention_mask
    masks: dict[str, Any] = {}
    # By position: the name of the cache depends on the release of transformers.
    given = inputs_embeds, attention_mask, cache, position_ids
    for word, window in words.items():
        if window is None:
            masks[word] = create_causal_mask(config, *given)
        else:
            masks[word] = create_sliding_window_causal_mask(_with_window(config, window), *given)
    return masks


def positions_of(attention_mask: Tensor | Masks | None, inputs_embeds: Tensor, cache: Cache | None) -> Tensor:
    """Positions int64 [1 or B, L] of the new tokens: how many real tokens of their row precede them.

    Raises ShapeError for a mask of other rows, or of fewer columns than the cache and the new tokens have.
    """
    batch, length = inputs_embeds.shape[:2]
    past: Any = 0 if cache is None else cache.get_seq_length()
    at: Tensor = torch.arange(length, device=inputs_embeds.device) + past
    if not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
        return at.unsqueeze(0)
    # A static cache may count in a tensor, which a compiled step cannot ask.
    columns = length if isinstance(past, Tensor) else length + past
    if attention_mask.shape[0] not in (1, batch) or attention_mask.shape[1] < columns:
        raise ShapeError(
            f"attention_mask: expected [{batch}, {columns}], over the cached tokens and these, got "
            f"{list(attention_mask.shape)}"
        )
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, at]


def _with_window(config: PreTrainedConfig, window: int) -> PreTrainedConfig:
    if config.sliding_window == window:
        return config
    config = copy.copy(config)
    config.sliding_window = window
    return config
