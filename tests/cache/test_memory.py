"""Bytes that `nbytes` reports, compared with the live storages of the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.storages import alive_since
from transformer import GroupQueryAttention, KVCache, MultiHeadAttention
from transformer.cache.policies import AccumulatedAttention, KeyNorm, LastQueries


def attention(**options: Any) -> GroupQueryAttention:
    return GroupQueryAttention(16, 4, 2, True, True, **options)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_size": 16},
        {"window_size": 16, "num_sinks": 4},
        {"max_cache_length": 800},
        {"cache_budget": (20, KeyNorm())},
        {"cache_budget": (20, AccumulatedAttention(8))},
        {"cache_budget": (20, LastQueries(8))},
    ],
    ids=lambda options: " ".join(options) or "expanding",
)
def test_a_long_prefill_and_the_steps_after_it(mode: type, options: dict[str, Any]) -> None:
    """Of a chunk of 5,000 tokens a window of 16 keeps no hidden buffer alive."""
    module, x = attention(**options), torch.randn(2, 5000 if "window_size" in options else 700, 16)
    with alive_since() as grown, mode():
        module(x)
    assert grown.bytes == module.kv_cache.nbytes > 0
    if "cache_budget" in options:
        assert grown.bytes < 2 * 2 * 2 * 200 * 4 * 4
    if "window_size" in options:
        slots = 2 * 16 + 64 + options.get("num_sinks", 0)
        assert grown.bytes == 2 * 2 * 2 * slots * 4 * 4
    with alive_since() as more, mode():
        for _ in range(100):
            module(x[:, :1])
    assert grown.bytes + more.bytes == module.kv_cache.nbytes


def test_a_recorded_prefill_over_a_window_once_its_graph_is_cut() -> None:
    module, x = attention(window_size=16), torch.randn(2, 2000, 16)
    with alive_since() as grown:
        module(x)
        module.kv_cache.detach()
    assert grown.bytes == module.kv_cache.nbytes == module.kv_cache.nbytes_used


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_source_and_the_one_after_it(mode: type) -> None:
    """Keys and values; and, of a source made in inference mode, the copy that is compared."""
    module, x = MultiHeadAttention(16, 4, use_kv_cache=True, kv_dim=8), torch.randn(2, 3, 16)
    with mode():
        source = torch.randn(2, 300, 8)
        real = torch.arange(300) < torch.tensor([[300], [200]])
        with alive_since() as grown:
            module(x, kv=source, kv_mask=real)
            module(x, kv=source, kv_mask=real)
        assert grown.bytes == module.kv_cache.nbytes == module.kv_cache.nbytes_used
        with alive_since() as more:
            module(x, kv=source[:, :50])
        assert grown.bytes + more.bytes == module.kv_cache.nbytes < grown.bytes


def test_a_part_of_a_larger_tensor_counts_whole() -> None:
    """Kept as it is, a source's view keeps all of the tensor that it shows a part of."""
    cache = KVCache(num_layers=1, num_kv_heads=2, head_dim=4)
    with alive_since() as grown:
        cache.update(0, "cross", *torch.randn(2, 3, 2, 900, 4)[:, :, :, :10])
    assert grown.bytes == cache.nbytes > 50 * cache.nbytes_used


@pytest.fixture
def model() -> nn.Module:
    """Own tokens over a window and all of them, and a reader of a source."""
    layers = {"sliding": attention(window_size=16, num_sinks=2), "full": attention()}
    model = nn.ModuleDict({**layers, "reader": MultiHeadAttention(16, 4, use_kv_cache=True)})
    # Made within a test: `alive_since` does not count what was there when the tests were collected.
    model.source = torch.zeros(2, 40, 16)
    return model


@torch.no_grad()
def fed(model: nn.Module, *lengths: int) -> KVCache:
    for length in lengths:
        x = torch.randn(2, length, 16)
        for name, layer in model.items():
            layer(x, kv=model.source if name == "reader" else None)
    return KVCache.from_model(model).remove(model)


def test_forked_truncated_and_cleared(model: nn.Module) -> None:
    with alive_since() as grown:
        cache = fed(model, 300, 3, 1)
    assert grown.bytes == cache.nbytes
    with alive_since() as grown:
        fork = cache.fork()
        cache.truncate(303)
    assert (grown.bytes, fork.nbytes) == (0, cache.nbytes)
    fork.install(model)
    with alive_since() as grown:
        fork = fed(model, 1)
    apart = 2 * 2 * 2 * 4 * 4 * (96 + 2 + 364)
    assert grown.bytes == apart, "the side that writes first has buffers of its own from now on; the source is shared"
    both = cache.nbytes + apart
    with alive_since() as grown:
        cache.clear()
        fork.clear()
    assert (grown.bytes, cache.nbytes, fork.nbytes) == (-both, 0, 0)


def test_joined_and_selected(model: nn.Module) -> None:
    apart = fed(model, 20, 1), fed(model, 300)
    with alive_since() as grown:
        joint = KVCache.join(apart)
    assert grown.bytes == joint.nbytes
    before = joint.nbytes
    with alive_since() as more:
        joint.select([3, 0, 1])
    assert grown.bytes + more.bytes == joint.nbytes == before * 3 // 4


def test_loaded_and_copied(model: nn.Module, tmp_path: Path) -> None:
    cache = fed(model, 300, 1)
    with alive_since() as grown:
        cache.save(tmp_path / "chat")
    assert grown.bytes == 0
    with alive_since() as grown:
        loaded = KVCache.load(tmp_path / "chat")
    assert grown.bytes == loaded.nbytes
    with alive_since() as grown:
        loaded.to(dtype=torch.float64)
    assert grown.bytes == loaded.nbytes // 2
