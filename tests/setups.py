"""Modules for tests: built from the oracle's plain options, with random numbers from a seed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from tests.oracle import Options
from tests.oracle_positions import Buckets, Rotary, Slopes
from transformer import GroupQueryAttention, MultiHeadAttention, MultiQueryAttention
from transformer.positions import ALiBi, RelativePositionBias, RotaryEmbedding

SCHEMES = {
    "none": None,
    "rotary halves": Rotary(rotary_dim=4),
    "rotary interleaved": Rotary(rotary_dim=4, base=100.0, interleaved=True),
    "rotary partial": Rotary(rotary_dim=2, base=500.0),
    "rotary partial interleaved": Rotary(rotary_dim=2, interleaved=True),
    "alibi": Slopes(),
    # Small enough that far buckets are reached, and one edge between them falls on a whole distance.
    "t5 causal": Buckets(num_buckets=8, max_distance=16),
    "t5 bidirectional": Buckets(num_buckets=8, max_distance=8, bidirectional=True),
}


def position_of(options: Options) -> nn.Module | None:
    """The library's position object for the oracle's scheme."""
    scheme = options.scheme
    if isinstance(scheme, Rotary):
        return RotaryEmbedding(
            options.head_dim,
            scheme.base,
            rotary_dim=scheme.rotary_dim,
            interleaved=scheme.interleaved,
        )
    if isinstance(scheme, Slopes):
        return ALiBi(options.num_heads)
    if isinstance(scheme, Buckets):
        return RelativePositionBias(
            options.num_heads,
            num_buckets=scheme.num_buckets,
            max_distance=scheme.max_distance,
            bidirectional=scheme.bidirectional,
        )
    return None


def build(
    options: Options,
    kind: str = "GQA",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **more: object,
) -> nn.Module:
    """An attention module of that kind; the same options and seed give the same weights."""
    heads = {"MHA": options.num_heads, "MQA": 1}
    assert options.num_groups == heads.get(kind, options.num_groups)
    keywords = {
        "apply_causal_mask": options.causal,
        "use_kv_cache": options.cached,
        "head_dim": options.head_dim,
        "window_size": options.window_size,
        "num_sinks": options.num_sinks,
        "scale": options.scale,
        "softcap": options.softcap,
        "sink_logits": options.sink_logits,
        "position": position_of(options),
        "cache_dtype": options.stored,
        "qk_norm": partial(nn.RMSNorm, eps=1e-5) if options.qk_norm else None,
        "qk_norm_per_head": options.qk_norm_per_head,
        **more,
    }
    if kind == "MHA":
        module = MultiHeadAttention(options.embed_dim, options.num_heads, **keywords)
    elif kind == "MQA":
        module = MultiQueryAttention(options.embed_dim, options.num_heads, **keywords)
    else:
        module = GroupQueryAttention(options.embed_dim, options.num_heads, options.num_groups, **keywords)
    fill(module, seed)
    return module.to(dtype)


def fill(module: nn.Module, seed: int) -> None:
    """Every parameter at random, biases and norms included: a zero bias or a norm of ones would hide
    mistakes."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        drawn = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        if "norm" in name:
            drawn = 1 + 0.3 * drawn
        elif parameter.ndim == 2 and "proj" in name:
            drawn = drawn / parameter.shape[1] ** 0.5
        with torch.no_grad():
            parameter.copy_(0.5 * drawn if name.endswith("bias") else drawn)


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)


def padding(spans: list[tuple[int, int]], length: int) -> Tensor:
    """`attention_mask` `[B, L]` with real tokens from `start` on, `count` of them, for each row's `(start,
    count)`."""
    mask = torch.zeros(len(spans), length, dtype=torch.bool)
    for row, (start, count) in zip(mask, spans, strict=True):
        row[start : start + count] = True
    return mask


def without_cache(options: Options) -> Options:
    return replace(options, cached=False)


def cached_lengths(module: nn.Module) -> list[int]:
    cache = module.kv_cache
    return [] if cache is None else cache.cached_lengths.tolist()
