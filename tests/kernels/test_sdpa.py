"""SDPA with groups, masks and causal order gives what matrix products give."""

import pytest
import torch

from tests.internals import sdpa_of_other_devices
from tests.kernels.heads import both, heads
from transformer.kernels import Kernel, backend, tuned
from transformer.kernels.biases import as_bias


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
    fused, reference = both(Kernel(0.3), *inputs, bias)
    torch.testing.assert_close(fused, reference, rtol=0, atol=1e-12)
    if bias is not None:
        # What devices other than this one take for groups and a mask.
        folded = sdpa_of_other_devices(*inputs, bias, 0.3).reshape(fused.shape)
        torch.testing.assert_close(folded, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_causal_order_is_the_lower_triangle(groups: int) -> None:
    inputs = heads(groups, 6, 6)
    bias = as_bias(torch.ones(6, 6, dtype=torch.bool).tril()).double()
    for out in both(Kernel(0.3), *inputs, causal=True):
        torch.testing.assert_close(out, Kernel(0.3)(*inputs, bias)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("most", [5, 6, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [4, 2])
def test_gradients_of_16_bits(groups: int, dtype: torch.dtype, most: int) -> None:
    """Just below, at and above the keys from which on they are not upcast: those of float64, to the last bits."""
    torch.manual_seed(0)
    given = [x.requires_grad_() for x in heads(groups, 6, 6, dtype)]
    exact = [x.detach().double().requires_grad_() for x in given]
    with backend("sdpa"), tuned(max_upcast_keys=most):
        out = Kernel(0.3)(*given, causal=True)[0]
        expected = Kernel(0.3)(*exact, causal=True)[0]
    assert out.dtype is dtype
    along = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad(out, given, along)
    assert {gradient.dtype for gradient in gradients} == {dtype}
    for gradient, right in zip(gradients, torch.autograd.grad(expected, exact, along.double()), strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=0, atol=8 * torch.finfo(dtype).eps)
