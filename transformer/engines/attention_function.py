"""Attention function for transformers' own models: this library's kernel behind their `attn_implementation`.

transformers looks an attention function and a mask function up by one name. The attention function gets queries, keys
and values that the model has projected, rotated and cached; keys are never repeated for the query heads of a group.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ArgumentError, DtypeError, ShapeError
from ..kernels import Kernel
from ..kernels.biases import given_bias
from ..kernels.inputs import Sinks
from ..tracing import is_traced
from .mask_function import attention_mask_of, hidden_as_bias

_UNSERVED = {
    "sinks": "sinks of its own form",
    "read_index": "the paged cache of generate_batch",
    "block_table": "the paged cache of generate_batch",
}
"""Options of attention functions that would change the result and are not computed here."""


def register_attention(name: str = "modular_attention") -> None:
    """Registers the kernel with transformers under `name`, for models that are loaded with that `attn_implementation`.

    `from_pretrained(..., attn_implementation=name)` and `model.set_attn_implementation(name)` then take it. A second
    call with the same name changes nothing.

    Raises ArgumentError unless `name` is a string that has no meaning to transformers yet.
    """
    if not (type(name) is str and name.isidentifier()):
        raise ArgumentError(f"name: expected a name of letters, digits and underscores, got {name!r:.200}")
    known = ALL_ATTENTION_FUNCTIONS.get(name, modular_attention)
    known_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(name, attention_mask_of)
    if name == "eager" or known is not modular_attention or known_mask is not attention_mask_of:
        raise ArgumentError(f"name: expected one that no attention implementation has yet, got {name!r}")
    if "flash" in name:
        raise ArgumentError(f"name: transformers prepares no masks for names with 'flash'; use another than {name!r}")
    AttentionInterface.register(name, modular_attention)
    AttentionMaskInterface.register(name, attention_mask_of)


def modular_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of `query` [B, H, L, D] over `key`, `value` [B, G, S, D]: output [B, L, H, D], and weights or None.

    `attention_mask` [1 or B, 1 or H, L or 1, S] is bool (true: visible) or added to the scores. None: one query sees
    every key, and several see them in causal order from the first on, where `is_causal`, or else `module.is_causal`,
    says so. `position_bias` [1 or B, H, L, S] is added as well (T5); `softcap` caps scores before both (Gemma 2);
    `s_aux` [H] is a score of each head that takes weight and gives no value (GPT-OSS). Weights [B, H, L, S], before
    dropout, are returned where `output_attentions` asks for them.

    Raises ShapeError, DtypeError or ArgumentError, naming the argument, for what is not computed here.
    """
    _check(module, query, key, value, attention_mask, options)
    heads, length = query.shape[1:3]
    causal = False
    if attention_mask is None and length > 1:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and key.shape[2] != length:
        if key.shape[2] < length:
            raise ArgumentError(
                f"attention_mask: expected one where {length} queries follow each other over {key.shape[2]} keys in "
                f"{type(module).__name__}, got None; set its is_causal to False for cross-attention"
            )
        # The first tokens of a static cache, whose other slots are empty.
        key, value = key[:, :, :length], value[:, :, :length]
        position_bias = None if position_bias is None else position_bias[..., :length]
    bias = None
    if attention_mask is not None:
        bias = given_bias(hidden_as_bias(attention_mask, query.dtype), query)
    if position_bias is not None:
        given = given_bias(position_bias, query)
        bias = given if bias is None else bias + given
    sinks = None
    if s_aux is not None:
        # Keys of zeros have a score of 0, to which the sink's own is added.
        nothing = key.new_zeros(key.shape[0], key.shape[1], 1, key.shape[3])
        sinks = Sinks(query, nothing, nothing, given_bias(s_aux, query).view(1, heads, 1, 1))
    kernel = Kernel(query.shape[-1] ** -0.5 if scaling is None else float(scaling), softcap)
    out, weights = kernel(
        query,
        key,
        value,
        bias,
        causal=causal,
        sinks=sinks,
        dropout=dropout if module.training else 0.0,
        return_weights=bool(options.get("output_attentions")),
        traced=is_traced(query),
    )
    if weights is not None and sinks is not None:
        weights = weights[..., 1:]
    return out.transpose(1, 2).contiguous(), weights


def _check(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> None:
    """Raises for a call that would fail later, or be computed as another one."""
    for name, what in _UNSERVED.items():
        if options.get(name) is not None:
            raise ArgumentError(
                f"{name}: {type(module).__name__} asks for {what}, which this attention implementation has not; load "
                "the model with another attn_implementation"
            )
    if query.ndim != 4 or key.ndim != 4 or value.shape != key.shape:
        raise ShapeError(
            f"query, key, value: expected [B, H, L, D] and twice [B, G, S, D], got {list(query.shape)}, "
            f"{list(key.shape)} and {list(value.shape)} in {type(module).__name__}"
        )
    batch, heads, length, head_dim = query.shape
    _, groups, keys, _ = key.shape
    if key.shape[0] != batch or key.shape[3] != head_dim or heads % groups:
        raise ShapeError(
            f"key: expected the rows, the head_dim and a divisor of the heads of the query {list(query.shape)}, got "
            f"{list(key.shape)} in {type(module).__name__}"
        )
    if mask is None:
        return
    if mask.ndim != 4:
        raise ShapeError(
            f"attention_mask: expected [1 or B, 1 or H, L, S], got {list(mask.shape)} in {type(module).__name__}"
        )
    for size, most in zip(mask.shape, (batch, heads, length, keys), strict=True):
        if size not in (1, most):
            raise ShapeError(
                f"attention_mask: expected what broadcasts to {[batch, heads, length, keys]}, got {list(mask.shape)} "
                f"in {type(module).__name__}"
            )
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise DtypeError(f"attention_mask: expected bool or a float dtype, got {mask.dtype}")
