"""Candidates of one attention layer: ours, and the bare kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from transformer import GroupQueryAttention
from transformer.cache import CachedLayer, CacheSlot
from transformer.positions import RotaryEmbedding

from .case import Candidate
from .grid import Grid, Place
from .runner import Timer

BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
"""Those of CUDA, of which the quickest is taken; on the CPU PyTorch has one and chooses by itself."""

SDPA = "SDPA without a cache"


def layer(grid: Grid, place: Place, num_groups: int, use_kv_cache: bool = False, **options: int) -> GroupQueryAttention:
    """A causal layer with rotary embeddings; `num_groups` selects one of the three modules."""
    rotary = RotaryEmbedding(grid.head_dim)
    attention = GroupQueryAttention(
        grid.embed_dim, grid.num_heads, num_groups, True, use_kv_cache, bias=False, position=rotary, **options
    )
    return place.module(attention)


def holding(grid: Grid, place: Place, num_groups: int, batch: int, cached: int) -> GroupQueryAttention:
    """A layer whose cache contains `cached` tokens of each row, written there without a prompt."""
    attention = layer(grid, place, num_groups, use_kv_cache=True)
    step = attention.plan(place.random(1, 1, 1).expand(batch, cached, grid.embed_dim))
    cache = attention.new_cache()
    shape = batch, num_groups, cached, grid.head_dim
    with torch.inference_mode():
        cached = CachedLayer.of(CacheSlot(cache), cache)
        _, cached.contents = cached.append(place.filled(*shape), place.filled(*shape), step)
        cached.publish()
    attention.kv_cache = cache
    return attention


def read_by(attention: GroupQueryAttention) -> list[Tensor]:
    """The buffers that a step must read: the weights and the cached keys and values."""
    held = [] if attention.kv_cache is None else list(attention.kv_cache.values())
    return [*held, *(parameter.detach() for parameter in attention.parameters())]


def cached_layer(attention: GroupQueryAttention, x: Tensor) -> Candidate:
    """Candidate that reads `x` [B, L, E] after the cached tokens."""
    cache = attention.kv_cache
    if cache is None:
        raise ValueError("attention: expected one whose cache holds tokens")
    held = cache.length
    return Candidate(lambda: attention(x), lambda: cache.truncate(held), cache.nbytes)


def bare(grid: Grid, place: Place, attention: GroupQueryAttention, x: Tensor, cached: int = 0) -> Candidate:
    """The same projections around SDPA over plain tensors, those of `cached` tokens before `x` [B, L, E] included.

    It has no rotary embedding, no cache and no checks.
    """
    batch, new, _ = x.shape
    groups = attention.num_groups
    before = [place.filled(batch, groups, cached + new, grid.head_dim) for _ in range(2)] if cached else []
    mask = None
    if cached and new > 1:
        mask = torch.ones(new, cached + new, dtype=torch.bool, device=place.device).tril(cached)

    def attended(backend: SDPBackend | None) -> Tensor:
        query = attention.q_proj(x).view(batch, new, grid.num_heads, -1).transpose(1, 2)
        key, value = (
            projection(x).view(batch, new, groups, -1).transpose(1, 2)
            for projection in (attention.k_proj, attention.v_proj)
        )
        if before:
            key, value = before
        out = sdpa(query, key, value, mask, not cached, backend)
        return attention.out_proj(out.transpose(1, 2).flatten(2))

    backend = best_backend(place, attended)
    return Candidate(lambda: attended(backend))


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, backend: SDPBackend | None = None
) -> Tensor:
    """PyTorch's kernel, in the given backend or in the one that PyTorch chooses."""
    grouped = query.shape[1] != key.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=grouped)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=grouped)


def best_backend(place: Place, run) -> SDPBackend | None:
    """The fastest backend that supports `run(backend)` on this device; None leaves the choice to PyTorch."""
    if place.device == "cpu":
        return None
    timer, seconds = Timer(place.device), {}
    for backend in (None, *BACKENDS):
        try:
            run(backend)
        except RuntimeError:  # it does not support this shape, dtype or mask
            continue
        seconds[backend] = min(timer(lambda backend=backend: run(backend)) for _ in range(3))
    return min(seconds, key=seconds.__getitem__)
