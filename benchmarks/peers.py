"""Attention layers of other libraries, set up as their own documents recommend for speed.

transformers runs on PyTorch's scaled_dot_product_attention, with rotary angles; over a DynamicCache, its default, or a
StaticCache, whose unused slots need a mask. x-transformers runs with `flash=True`. `torch.nn.MultiheadAttention` has no
cache; with `need_weights=False` and `is_causal=True` it takes the fused kernel.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding
from x_transformers.x_transformers import Attention as XAttention
from x_transformers.x_transformers import Intermediates, RotaryEmbedding

from .case import Candidate
from .grid import Grid, Place
from .runner import BURST

# transformers' name of the argument that takes a cache, which changed within version 5.
CACHE = "cache" if "cache" in inspect.signature(LlamaAttention.forward).parameters else "past_key_values"

SLACK = 64
"""Tokens that a StaticCache has room for beyond what it holds and a burst adds, as our own buffers have at first."""

DYNAMIC, STATIC = "transformers, DynamicCache", "transformers, StaticCache"
WHOLE = "transformers"
X_TRANSFORMERS, TORCH = "x-transformers", "torch.nn.MultiheadAttention"


def llama_config(embed_dim: int, num_heads: int, num_groups: int) -> LlamaConfig:
    """One layer of these widths."""
    return LlamaConfig(
        hidden_size=embed_dim,
        num_attention_heads=num_heads,
        num_key_value_heads=num_groups,
        num_hidden_layers=1,
        max_position_embeddings=1 << 21,
        attn_implementation="sdpa",
    )


def cached_peers(
    grid: Grid, place: Place, num_groups: int, batch: int, cached: int, new: int = 1, *, with_x: bool = True
) -> dict[str, Candidate]:
    """All other libraries with a cache of `cached` tokens, for a step of `new` tokens per row.

    `with_x`: x-transformers among them.
    """
    shape = batch, num_groups, cached, grid.head_dim
    peers = {DYNAMIC: llama_dynamic(grid, place, shape, new), STATIC: llama_static(grid, place, shape, new)}
    return peers | ({X_TRANSFORMERS: x_transformers_cached(grid, place, shape, new)} if with_x else {})


def room(new: int) -> int:
    """Tokens that are read, `new` at a time, before a cache is rewound, plus slack."""
    return BURST * new + SLACK


def llama_dynamic(
    grid: Grid, place: Place, shape: tuple[int, int, int, int], new: int, real: Tensor | None = None
) -> Candidate:
    """LlamaAttention over a DynamicCache; `real` [B, cached + new] where rows are padded."""
    config = llama_config(grid.embed_dim, grid.num_heads, shape[1])
    cache = DynamicCache(config=config)
    return _llama(config, grid, place, shape, new, cache, real)


def llama_static(
    grid: Grid, place: Place, shape: tuple[int, int, int, int], new: int, real: Tensor | None = None
) -> Candidate:
    """LlamaAttention over a StaticCache; `real` [B, cached + new] where rows are padded."""
    config = llama_config(grid.embed_dim, grid.num_heads, shape[1])
    cache = StaticCache(config=config, max_cache_len=shape[2] + room(new))
    return _llama(config, grid, place, shape, new, cache, real)


def _llama(
    config: LlamaConfig,
    grid: Grid,
    place: Place,
    shape: tuple[int, int, int, int],
    new: int,
    cache: Any,
    real: Tensor | None,
) -> Candidate:
    attention = place.module(LlamaAttention(config, 0))
    rotary = LlamaRotaryEmbedding(config).to(place.device)
    batch, _, cached, _ = shape
    cache.update(place.filled(*shape), place.filled(*shape), 0)
    x = place.random(batch, new, grid.embed_dim)
    static = isinstance(cache, StaticCache)
    slots = torch.arange(cached + room(new), device=place.device)
    held = cached

    def run() -> Tensor:
        nonlocal held
        positions = slots[held : held + new].unsqueeze(0)
        mask = None
        # The masks of its models: none for one token over a DynamicCache without padding.
        if static or new > 1 or real is not None:
            columns = slots[: cache.layers[0].max_cache_len] if static else slots[: held + new]
            mask = (columns <= positions[0, :, None])[None, None]
            if real is not None:
                mask = mask & nn.functional.pad(real, (0, len(columns) - real.shape[1]), value=True)[:, None, None]
        held += new
        out: Tensor = attention(x, position_embeddings=rotary(x, positions), attention_mask=mask, **{CACHE: cache})[0]
        return out

    def rewind() -> None:
        nonlocal held
        if static:
            # Not every release of version 5 can crop a StaticCache; this has the same effect.
            cache.layers[0].cumulative_length.add_(cached - held)
        else:
            cache.crop(cached - held)
        held = cached

    layer = cache.layers[0]
    return Candidate(run, rewind, layer.keys.nbytes + layer.values.nbytes)


def x_transformers_cached(grid: Grid, place: Place, shape: tuple[int, int, int, int], new: int) -> Candidate:
    """x-transformers' Attention over its own cache."""
    batch, num_groups, cached, head_dim = shape
    attention = place.module(x_attention(grid, num_groups))
    rotary = RotaryEmbedding(head_dim).to(place.device)
    held = place.filled(*shape), place.filled(*shape)
    state = Intermediates(cached_kv=held)
    x = place.random(batch, new, grid.embed_dim)
    # It caches unrotated keys, and rotates all of them in each step.
    angles, scale = rotary(torch.arange(cached + room(new), device=place.device))

    def run() -> Tensor:
        nonlocal state
        turned = angles[:, : state.cached_kv[0].shape[2] + new], scale
        out, state = attention(x, rotary_pos_emb=turned, cache=state, return_intermediates=True)
        result: Tensor = out
        return result

    def rewind() -> None:
        nonlocal state
        state = Intermediates(cached_kv=tuple(each[:, :, :cached] for each in state.cached_kv))

    return Candidate(run, rewind, sum(each.nbytes for each in held))


class LlamaWhole(nn.Module):
    """LlamaAttention over a whole sequence without a cache."""

    def __init__(self, grid: Grid, num_groups: int) -> None:
        super().__init__()
        config = llama_config(grid.embed_dim, grid.num_heads, num_groups)
        self.attention = LlamaAttention(config, 0)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` bool [B or 1, 1, L, L] where not just causal."""
        angles = self.rotary(x, torch.arange(x.shape[1], device=x.device).unsqueeze(0))
        out: Tensor = self.attention(x, position_embeddings=angles, attention_mask=mask)[0]
        return out


class XTransformersWhole(nn.Module):
    """x-transformers' Attention over a whole sequence."""

    def __init__(self, grid: Grid, num_groups: int) -> None:
        super().__init__()
        self.attention = x_attention(grid, num_groups)
        self.rotary = RotaryEmbedding(grid.head_dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` bool [B, L], true for a real token."""
        angles = self.rotary(torch.arange(x.shape[1], device=x.device))
        out: Tensor = self.attention(x, rotary_pos_emb=angles, mask=mask)
        return out


class TorchWhole(nn.Module):
    """torch.nn.MultiheadAttention over a whole sequence: as many key/value heads as heads, and no positions."""

    def __init__(self, grid: Grid, length: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(grid.embed_dim, grid.num_heads, bias=False, batch_first=True)
        # It requires the mask, but with `is_causal` does not read it.
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, E]."""
        out: Tensor = self.attention(x, x, x, attn_mask=self.mask, is_causal=True, need_weights=False)[0]
        return out


def x_attention(grid: Grid, num_groups: int) -> XAttention:
    """x-transformers' layer."""
    return XAttention(
        dim=grid.embed_dim, heads=grid.num_heads, kv_heads=num_groups, dim_head=grid.head_dim, causal=True, flash=True
    )
