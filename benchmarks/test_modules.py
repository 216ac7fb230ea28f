"""Benchmarks of the modules for pytest-benchmark: `pytest benchmarks --benchmark-enable`."""

import pytest
import torch

from transformer import GroupQueryAttention
from transformer.positions import RotaryEmbedding


@pytest.mark.parametrize("num_groups", [8, 2, 1])
@pytest.mark.parametrize("cached", [128, 2048])
@pytest.mark.parametrize("window", [None, 512])
def test_decode_step(benchmark, num_groups: int, cached: int, window: int | None) -> None:
    """One token after `cached` others; the number of key/value heads selects the module."""
    attention = GroupQueryAttention(
        512, 8, num_groups, True, True, position=RotaryEmbedding(64), window_size=window
    ).eval()
    with torch.inference_mode():
        attention(torch.randn(1, cached, 512))
        out = benchmark(attention, torch.randn(1, 1, 512))
    assert out.shape == (1, 1, 512)


@pytest.mark.parametrize("num_groups", [8, 2, 1])
@pytest.mark.parametrize("window", [None, 256])
def test_prefill(benchmark, num_groups: int, window: int | None) -> None:
    """A prompt of 2,048 tokens without a cache."""
    attention = GroupQueryAttention(512, 8, num_groups, True, position=RotaryEmbedding(64), window_size=window).eval()
    with torch.inference_mode():
        out = benchmark(attention, torch.randn(1, 2048, 512))
    assert out.shape == (1, 2048, 512)
