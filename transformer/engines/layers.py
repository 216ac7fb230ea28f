"""Norms, feed-forward networks and decoder layers of the engines' modules.

The forwards are written as transformers and vLLM read them: vLLM finds norms and gated networks by tracing a forward
with the one argument `hidden_states`, once per class, so no forward here branches on an option.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ..models import NormConfig
from ..models.composition import LayerParts
from ..positions import RotaryTable, Rotation
from .attention import ModularAttention

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "silu": "silu"}
"""Names of our activations, each with that of transformers."""


class ModularRMSNorm(nn.Module):
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last dimension, in the dtype of the weights."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.normalized_shape = (dim,)
        self.eps = float(eps)
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., dim] to the same shape and dtype."""
        states = hidden_states.to(self.weight.dtype)
        return F.rms_norm(states, self.normalized_shape, self.weight, self.eps).to(hidden_states.dtype)

    def reset_parameters(self) -> None:
        """Sets the weights to one."""
        nn.init.ones_(self.weight)


class ModularUnitOffsetRMSNorm(nn.Module):
    """The same with the factor `1 + weight`, in float32. vLLM recognises the offset in this form only."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = float(eps)
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., dim] to the same shape and dtype."""
        states = hidden_states.float()
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps)
        return (states * (1.0 + self.weight.float())).to(hidden_states.dtype)

    def reset_parameters(self) -> None:
        """Sets the weights to zero."""
        nn.init.zeros_(self.weight)


class ModularUnitOffsetLayerNorm(nn.Module):
    """Layer normalisation with the factor `1 + weight`, in float32."""

    def __init__(self, dim: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.normalized_shape = (dim,)
        self.eps = float(eps)
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., dim] to the same shape and dtype."""
        bias = None if self.bias is None else self.bias.float()
        factor = 1.0 + self.weight.float()
        return F.layer_norm(hidden_states.float(), self.normalized_shape, factor, bias, self.eps).to(
            hidden_states.dtype
        )

    def reset_parameters(self) -> None:
        """Sets the weights and the bias to zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


NORMS = nn.LayerNorm, ModularRMSNorm, ModularUnitOffsetRMSNorm, ModularUnitOffsetLayerNorm
"""The classes of norms that `norm_of` makes."""


class ModularMLP(nn.Module):
    """Feed-forward network `down(activation(up(x)))`."""

    def __init__(self, layer: LayerParts) -> None:
        super().__init__()
        options = layer.options
        self.dropout = layer.each_dropout.hidden
        self.up_proj = nn.Linear(options.d_model, options.d_ff, bias=options.feed_forward_bias)
        self.down_proj = nn.Linear(options.d_ff, options.d_model, bias=options.feed_forward_bias)
        self.act_fn = ACT2FN[ACTIVATIONS[options.activation]]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, L, E] to [B, L, E]."""
        hidden = self.act_fn(self.up_proj(hidden_states))
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        out: Tensor = self.down_proj(hidden)
        return out


class ModularGatedMLP(nn.Module):
    """Gated feed-forward network `down(activation(gate(x)) * up(x))`."""

    def __init__(self, layer: LayerParts) -> None:
        super().__init__()
        options = layer.options
        self.dropout = layer.each_dropout.hidden
        self.gate_proj = nn.Linear(options.d_model, options.d_ff, bias=options.feed_forward_bias)
        self.up_proj = nn.Linear(options.d_model, options.d_ff, bias=options.feed_forward_bias)
        self.down_proj = nn.Linear(options.d_ff, options.d_model, bias=options.feed_forward_bias)
        self.act_fn = ACT2FN[ACTIVATIONS[options.activation]]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, L, E] to [B, L, E]."""
        hidden = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        out: Tensor = self.down_proj(hidden)
        return out


class ModularDecoderLayer(GradientCheckpointingLayer):
    """Self-attention and a feed-forward network on one residual stream, one after the other or in parallel, with norms.

    The two `post_` norms act on the sum with norms after it, else on the output of the branch.
    """

    def __init__(self, config: PreTrainedConfig, layer: LayerParts, layer_idx: int, rotation: Rotation | None) -> None:
        super().__init__()
        options, width = layer.options, layer.options.d_model
        self.residual = options.residual
        self.norms_sum = options.norm_placement == "after"
        self.dropout = layer.each_dropout.branches
        self.residual_scale = options.residual_scale
        before, after = options.norm_placement in ("before", "both"), options.norm_placement != "before"
        self.input_layernorm = norm_of(options, width) if before else None
        self.self_attn = ModularAttention(config, layer, layer_idx, rotation, *_head_norms(layer))
        self.post_attention_layernorm = norm_of(options, width) if after else None
        one_norm = self.residual == "parallel_one_norm"
        self.pre_feedforward_layernorm = norm_of(options, width) if before and not one_norm else None
        self.mlp = ModularGatedMLP(layer) if options.feed_forward == "gated" else ModularMLP(layer)
        self.post_feedforward_layernorm = norm_of(options, width) if after else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: RotaryTable | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, L, E] to [B, L, E]."""
        states = hidden_states if self.input_layernorm is None else self.input_layernorm(hidden_states)
        added, _ = self.self_attn(states, position_embeddings, attention_mask, past_key_values, **kwargs)
        if self.residual == "parallel_one_norm":
            return self._sum(hidden_states, added + self.mlp(states), None)
        total = self._sum(hidden_states, added, self.post_attention_layernorm)
        states = hidden_states if self.residual == "parallel" else total
        if self.pre_feedforward_layernorm is not None:
            states = self.pre_feedforward_layernorm(states)
        return self._sum(total, self.mlp(states), self.post_feedforward_layernorm)

    def _sum(self, hidden_states: Tensor, added: Tensor, norm: nn.Module | None) -> Tensor:
        """The stream and the output of a branch, with the norm after it, the dropout and the scale."""
        if norm is not None and not self.norms_sum:
            added = norm(added)
        if self.dropout and self.training:
            added = F.dropout(added, self.dropout)
        if self.residual_scale != 1.0:
            added = added * self.residual_scale
        hidden_states = hidden_states + added
        return norm(hidden_states) if norm is not None and self.norms_sum else hidden_states


def norm_of(config: NormConfig, dim: int) -> nn.Module:
    """The norm of a configuration over `dim`."""
    if config.norm == "rms":
        kind = ModularUnitOffsetRMSNorm if config.norm_unit_offset else ModularRMSNorm
        return kind(dim, config.norm_eps)
    if config.norm_unit_offset:
        return ModularUnitOffsetLayerNorm(dim, config.norm_eps, config.norm_bias)
    # vLLM replaces PyTorch's own class.
    return nn.LayerNorm(dim, config.norm_eps, bias=config.norm_bias)


def _head_norms(layer: LayerParts) -> tuple[nn.Module, ...]:
    """The norms of queries and of keys; empty if there are none."""
    if layer.qk_norm is None:
        return ()
    dim = layer.options.head_dim or layer.options.d_model // layer.options.num_heads
    return norm_of(layer.qk_norm, dim), norm_of(layer.qk_norm, dim)
