"""Both ways through the kernel give the same result, and soft caps and sinks are what they say."""

import pytest
import torch

from transformer.attention import kernels
from transformer.attention.kernels import Kernel, Sinks, as_bias, sees_nothing


def heads(groups: int, length: int, keys: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = [(2, 4, length, 8), (2, groups, keys, 8), (2, groups, keys, 8)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def both(kernel: Kernel, *inputs: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The fused way (where nothing forbids it) and the products that weights ask for."""
    return kernel(*inputs, **options)[0], kernel(*inputs, **options, return_weights=True)[0]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("shape", [None, (1, 6), (5, 6), (4, 1, 6), (2, 1, 1, 6), (2, 4, 5, 6), (1, 4, 5, 1)])
def test_fused_equals_products(groups: int, length: int, shape: tuple[int, ...] | None) -> None:
    inputs = heads(groups, length, 6)
    bias = None
    if shape is not None:
        if length == 1 and len(shape) > 1:
            shape = (*shape[:-2], 1, shape[-1])
        bias = torch.randn(shape, dtype=torch.float64)
    fused, products = both(Kernel(0.3), *inputs, bias)
    torch.testing.assert_close(fused, products, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_causal_order_is_the_lower_triangle(groups: int) -> None:
    inputs = heads(groups, 6, 6)
    bias = as_bias(torch.ones(6, 6, dtype=torch.bool).tril()).double()
    for out in both(Kernel(0.3), *inputs, causal=True):
        torch.testing.assert_close(out, Kernel(0.3)(*inputs, bias)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [4, 1])
def test_the_quick_way_over_many_keys(groups: int) -> None:
    """The same over few keys at a time, where the other way is chosen, merged by hand."""
    keys = kernels.MANY_KEYS + 3
    query, key, value = heads(groups, 1, keys)
    out, weights = Kernel(0.3)(query, key, value, return_weights=True)
    quick = Kernel(0.3)(query, key, value)[0]
    torch.testing.assert_close(quick, out, rtol=0, atol=1e-12)
    assert weights is not None
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_products_work_in_float32(dtype: torch.dtype) -> None:
    inputs = heads(2, 3, 40, dtype)
    exact = Kernel(0.3)(*(x.double() for x in inputs))[0]
    for out in both(Kernel(0.3), *inputs):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 2e-3)


def test_softcap_bounds_the_scores() -> None:
    query, key, value = heads(4, 1, 6)
    _, weights = Kernel(100.0, softcap=2.0)(query, key, value, return_weights=True)
    assert weights is not None
    scores = 2.0 * torch.tanh(100.0 * (query @ key.transpose(-1, -2)) / 2.0)
    torch.testing.assert_close(weights, scores.softmax(-1))


def test_sinks_share_one_softmax() -> None:
    query, key, value = heads(2, 3, 6)
    sinks = Sinks(query, key[:, :, :2], value[:, :, :2], None)
    apart, weights = Kernel(0.3)(query, key[:, :, 2:], value[:, :, 2:], sinks=sinks, return_weights=True)
    together, expected = Kernel(0.3)(query, key, value, return_weights=True)
    torch.testing.assert_close(apart, together)
    torch.testing.assert_close(weights, expected)


def test_sees_nothing() -> None:
    hidden = float("-inf")
    bias = torch.tensor([[hidden, 0.0], [hidden, hidden]])
    assert sees_nothing(bias).tolist() == [[False], [True]]
    assert sees_nothing(bias, torch.tensor([[hidden], [0.0]])).tolist() == [[False], [False]]
