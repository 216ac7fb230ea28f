"""Projections of other kinds: scripted, plain callables, and those whose output is strided."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from transformer import GroupQueryAttention, MultiHeadAttention, MultiQueryAttention
from transformer.kernels import Backend, backend, tuning
from transformer.positions import RotaryEmbedding


class Strided(nn.Linear):
    """A projection whose output has its last dimension not contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mT.contiguous().mT


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ["scripted", "callable"])
@torch.no_grad()
def test_a_query_projection_of_another_kind(kind: str, cached: bool) -> None:
    torch.manual_seed(0)
    module, x = MultiHeadAttention(16, 4, True, cached).eval(), torch.randn(2, 5, 16)
    expected = module(x)
    module.kv_cache = None
    linear = module.q_proj
    if kind == "scripted":
        module.q_proj = torch.jit.script(linear)
    else:
        del module.q_proj
        object.__setattr__(module, "q_proj", lambda given: linear(given))
    torch.testing.assert_close(module(x), expected)


def error_over_a_prefix(module: nn.Module, cut: list[int]) -> float:
    """The largest error of the last chunk, against the same module in float64 in one call."""
    x = torch.randn(1, sum(cut), module.embed_dim)
    with torch.no_grad():
        parts = [module(part) for part in x.split(cut, 1)]
        module.kv_cache = None
        exact = module.double()(x.double())[:, -cut[-1] :]
    return (parts[-1].double() - exact).abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [2, 5])
@pytest.mark.parametrize("position", [None, RotaryEmbedding(16)], ids=["no position", "rotary"])
def test_a_few_tokens_over_a_long_prefix(position: RotaryEmbedding | None, chunk: int) -> None:
    """Projections of few rows come out with their features strided by the tokens, for which the operator behind SDPA
    reads other memory: errors of 1e-3 to 1e16, or NaN."""
    torch.manual_seed(0)
    module = MultiQueryAttention(512, 32, True, True, head_dim=16, position=position).eval()
    cached = tuning.active.min_prefix + 400
    assert error_over_a_prefix(module, [cached, chunk]) < 1e-5


@pytest.mark.parametrize(("name", "cut"), [("prefix_merge", [40, 3]), ("split_kv", [40, 1])])
def test_strided_heads_in_each_backend(name: str, cut: list[int]) -> None:
    torch.manual_seed(0)
    make: Callable[..., nn.Module] = GroupQueryAttention if name == "prefix_merge" else MultiQueryAttention
    module = make(32, 4, *([2] if name == "prefix_merge" else []), True, True).eval()
    for projection in ("q_proj", "k_proj", "v_proj"):
        linear = getattr(module, projection)
        strided = Strided(linear.in_features, linear.out_features)
        strided.load_state_dict(linear.state_dict())
        setattr(module, projection, strided)
    x = torch.randn(2, sum(cut), 32)
    with torch.no_grad():
        first, last = x.split(cut, 1)
        module(first)
        with backend(Backend(name)):
            out = module(last)
        module.kv_cache = None
        expected = module(x)[:, -cut[-1] :]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
