"""Mask function for transformers' own models: what a query may not see, as numbers, once for all layers of one kind.

Masks follow transformers' rules (causal order, windows, chunks, padding, packed sequences) by its own function; here
they become float32 once, instead of in every layer, and one query that sees every key needs none.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.masking_utils import sdpa_mask

from ..errors import ConfigurationError
from ..tracing import is_traced


def attention_mask_of(*, dtype: torch.dtype = torch.float32, **rules: Any) -> Tensor | None:
    """What `modular_attention` takes as its mask: float [B, 1, L, S], or None where it needs none.

    `rules` are those of transformers' `sdpa_mask`, and `dtype` is that of the model's numbers. None stands for causal
    order from the first key on, and for one query that sees every key.

    Raises ConfigurationError for a model whose attention modules look no attention function up: they would take None
    for a mask that hides nothing.
    """
    _check_model(rules.get("config"))
    visible = sdpa_mask(dtype=dtype, **rules)
    if visible is None:
        return None
    traced = is_traced(visible)
    if rules.get("allow_is_causal_skip") and rules["q_length"] == 1 and not traced and bool(visible.all()):
        return None
    if not traced and visible.stride(0) == 0:
        # Equal rows are formed once.
        return hidden_as_bias(visible[:1], dtype).expand(visible.shape)
    return hidden_as_bias(visible, dtype)


def hidden_as_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as 0 and the lowest number of `dtype`, in at least float32; another mask as it is.

    Not -inf: a padded query whose every key is hidden then attends to all alike, and its numbers stay finite.
    """
    if visible.dtype is not torch.bool:
        return visible
    added = torch.float64 if dtype is torch.float64 else torch.float32
    numbers = torch.zeros((), dtype=added, device=visible.device).expand(visible.shape)
    return numbers.masked_fill(~visible, torch.finfo(dtype).min)


def _check_model(config: PretrainedConfig | None) -> None:
    """Raises for a model whose file has attention modules of its own that call no attention function."""
    file = type(config).__module__.replace("configuration_", "modeling_")
    found = vars(sys.modules[file]) if file in sys.modules else {}
    own = [
        name
        for name, each in found.items()
        if "Attention" in name and isinstance(each, type) and issubclass(each, nn.Module) and each.__module__ == file
    ]
    if own and "ALL_ATTENTION_FUNCTIONS" not in found:
        raise ConfigurationError(
            f"attn_implementation: {own[0]} of {file} computes attention itself and looks no attention function up; "
            "load this model with attn_implementation='eager'"
        )
