"""Helpers for whole conversations: feeding a sequence in chunks, and snapshots of a cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from transformer.cache import SelfAttentionState

NAN = float("nan")


def run_chunks(
    module: nn.Module, x: Tensor, lengths: Iterable[int], mode: bool | None = None, mask: Tensor | None = None
) -> Tensor:
    """The outputs of calls with `lengths` tokens each, side by side."""
    outputs, start = [], 0
    for length in lengths:
        own = slice(start, start + length)
        outputs.append(module(x[:, own], None, mode, attention_mask=None if mask is None else mask[:, own]))
        start += length
    assert start == x.shape[1], "the chunks are the sequence"
    return torch.cat(outputs, dim=1)


def cache_snapshot(module: nn.Module) -> object:
    """The whole content of a module's caches, as bytes and numbers: equal if nothing changed."""
    cache = module.kv_cache
    if cache is None:
        return None
    held = [numbers(cache[name]) for name in ("key", "value")]
    source, state = cache.source, cache.contents.state
    kept = None if source is None else (numbers(source.key), numbers(source.value))
    beside = [numbers(tensor) for tensor in state.tensors_beside] if isinstance(state, SelfAttentionState) else []
    return held, cache.lengths.tolist(), cache.cached_lengths.tolist(), cache.batch, cache.window, kept, beside


def numbers(tensor: Tensor) -> tuple[object, ...]:
    """Shape, dtype and every bit of a tensor, so that NaN equals NaN."""
    plain = tensor.detach().contiguous()
    return tuple(plain.shape), plain.dtype, plain.flatten().view(torch.uint8).numpy().tobytes()


def assert_same(actual: Sequence[Tensor] | Tensor, expected: Sequence[Tensor] | Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)
