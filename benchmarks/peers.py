"""The peers, set up as their own documents recommend for inference: one attention layer with a cache each."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding
from x_transformers.x_transformers import Attention as XAttention
from x_transformers.x_transformers import Intermediates, RotaryEmbedding

Step = Callable[[], Tensor]


# Its name of the argument that takes a cache, which changed within version 5.
CACHE = "cache" if "cache" in inspect.signature(LlamaAttention.forward).parameters else "past_key_values"


def llama_config(embed_dim: int, num_heads: int, num_groups: int) -> LlamaConfig:
    """One layer of these widths, on PyTorch's scaled_dot_product_attention."""
    return LlamaConfig(
        hidden_size=embed_dim,
        num_attention_heads=num_heads,
        num_key_value_heads=num_groups,
        num_hidden_layers=1,
        max_position_embeddings=1 << 20,
        attn_implementation="sdpa",
    )


def llama_decode(embed_dim: int, num_heads: int, num_groups: int, batch: int, cached: int) -> Step:
    """A decode step of transformers' LlamaAttention over a DynamicCache, which grows by one with each call."""
    config = llama_config(embed_dim, num_heads, num_groups)
    attention, rotary = LlamaAttention(config, 0).eval(), LlamaRotaryEmbedding(config)
    cache = DynamicCache(config=config)
    shape = batch, num_groups, cached, embed_dim // num_heads
    cache.update(torch.randn(shape), torch.randn(shape), 0)
    x = torch.randn(batch, 1, embed_dim)
    position = torch.tensor([[cached]])

    def step() -> Tensor:
        angles = rotary(x, position)
        position.add_(1)
        out: Tensor = attention(x, position_embeddings=angles, attention_mask=None, **{CACHE: cache})[0]
        return out

    return step


def llama_whole(embed_dim: int, num_heads: int, num_groups: int) -> Callable[[Tensor], Tensor]:
    """transformers' LlamaAttention over a whole sequence without a cache."""
    config = llama_config(embed_dim, num_heads, num_groups)
    attention, rotary = LlamaAttention(config, 0).eval(), LlamaRotaryEmbedding(config)

    def whole(x: Tensor) -> Tensor:
        angles = rotary(x, torch.arange(x.shape[1]).unsqueeze(0))
        out: Tensor = attention(x, position_embeddings=angles, attention_mask=None)[0]
        return out

    return whole


def x_transformers_decode(embed_dim: int, num_heads: int, num_groups: int, batch: int, cached: int) -> Step:
    """A decode step of x-transformers' Attention (flash) over its own cache, which grows by one with each call."""
    head_dim = embed_dim // num_heads
    attention = XAttention(
        dim=embed_dim, heads=num_heads, kv_heads=num_groups, dim_head=head_dim, causal=True, flash=True
    ).eval()
    rotary = RotaryEmbedding(head_dim)
    shape = batch, num_groups, cached, head_dim
    state: dict[str, Any] = {"cache": Intermediates(cached_kv=(torch.randn(shape), torch.randn(shape)))}
    x = torch.randn(batch, 1, embed_dim)

    def step() -> Tensor:
        length = state["cache"].cached_kv[0].shape[2]
        angles = rotary(torch.arange(length, length + 1))
        out, state["cache"] = attention(x, rotary_pos_emb=angles, cache=state["cache"], return_intermediates=True)
        result: Tensor = out
        return result

    return step
