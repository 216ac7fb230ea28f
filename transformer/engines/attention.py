"""Self-attention of the engines' modules, through transformers' attention interface."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..models.composition import LayerParts
from ..positions import RotaryTable, Rotation


class ModularAttention(nn.Module):
    """Causal self-attention of one layer.

    vLLM reads the source of `forward`: it merges the three projections, and replaces the one call of the function that
    is looked up in `ALL_ATTENTION_FUNCTIONS`. The number of heads is never used there: with tensor parallelism it is
    the rank's own.
    """

    is_causal = True

    def __init__(
        self,
        config: PreTrainedConfig,
        layer: LayerParts,
        layer_idx: int,
        rotation: Rotation | None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        options = layer.options
        width, out_bias = options.d_model, options.out_bias
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = options.head_dim or width // options.num_heads
        self.num_key_value_groups = options.num_heads // options.kv_heads
        self.scaling = self.head_dim**-0.5 if options.scale is None else float(options.scale)
        self.softcap = None if options.softcap is None else float(options.softcap)
        self.sliding_window = options.window_size
        self.attention_dropout = layer.each_dropout.attention
        self.rotation = rotation
        self.q_proj = nn.Linear(width, options.num_heads * self.head_dim, bias=options.attention_bias)
        self.k_proj = nn.Linear(width, options.kv_heads * self.head_dim, bias=options.attention_bias)
        self.v_proj = nn.Linear(width, options.kv_heads * self.head_dim, bias=options.attention_bias)
        out_bias = options.attention_bias if out_bias is None else out_bias
        self.o_proj = nn.Linear(options.num_heads * self.head_dim, width, bias=out_bias)
        self.q_norm = q_norm
        self.k_norm = k_norm

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: RotaryTable | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L, E] to the output [B, L, E], and the weights [B, H, L, S] where the implementation gives them."""
        input_shape = hidden_states.shape[:-1]
        heads = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads)
        key = self.k_proj(hidden_states).view(heads)
        value = self.v_proj(hidden_states).view(heads)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if self.rotation is not None and position_embeddings is not None:
            query = self.rotation.rotate(query, position_embeddings)
            key = self.rotation.rotate(key, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            **kwargs,
        )
        return self.o_proj(out.reshape(*input_shape, -1).contiguous()), weights


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **unused: Any,  # noqa: ARG001 (what other implementations of the interface take)
) -> tuple[Tensor, Tensor]:
    """Attention by matrix products, with a soft cap: `query` [B, H, L, D], `key` and `value` [B, G, S, D].

    Gives the output [B, L, H, D] and the weights [B, H, L, S]. `attention_mask` broadcasts to the scores' shape: it is
    added to them or, as bool, true where a key is visible.
    """
    batch, num_heads, length, head_dim = query.shape
    groups = key.shape[1]
    # Each key/value head once for its queries: no repeated keys.
    query = query.reshape(batch, groups, num_heads // groups * length, head_dim)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.reshape(batch, num_heads, length, key.shape[2])
    if attention_mask is not None and attention_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    kept = F.dropout(weights, dropout, module.training) if dropout else weights
    out = torch.matmul(kept.reshape(batch, groups, -1, key.shape[2]), value)
    return out.reshape(batch, num_heads, length, head_dim).transpose(1, 2).contiguous(), weights
