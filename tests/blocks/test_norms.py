"""Root mean square and layer norm: formulas, dtypes, and weights as offsets from one."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from tests.blocks.loops import each, norm
from tests.setups import tokens
from transformer.blocks import LayerNorm, RMSNorm
from transformer.errors import ConfigurationError

NORMS = {
    "rms": RMSNorm,
    "rms, unit offset": partial(RMSNorm, unit_offset=True),
    "layer": LayerNorm,
    "layer, no bias": partial(LayerNorm, bias=False),
    "layer, unit offset": partial(LayerNorm, unit_offset=True),
    "layer, unit offset, no bias": partial(LayerNorm, bias=False, unit_offset=True),
}
SHAPES = ((5, 1), (2, 3, 7), (2, 2, 3, 16), (0, 4), (9,))


def filled(name: str, dim: int, dtype: torch.dtype = torch.float64, **options: float) -> nn.Module:
    module = NORMS[name](dim, **options)
    for seed, parameter in enumerate(module.parameters()):
        with torch.no_grad():
            parameter.copy_(tokens(*parameter.shape, seed=seed + 10))
    return module.to(dtype)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("name", NORMS)
def test_by_formula(name: str, eps: float) -> None:
    """Vectors that are far from centred and far from size one, so that a norm of the other kind would differ."""
    for seed, shape in enumerate(SHAPES):
        module = filled(name, shape[-1], eps=eps)
        x = 3 * tokens(*shape, seed=seed) + 2
        expected = each(partial(norm, module), x)
        out = module(x)
        assert out.shape == x.shape
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
        single = module.float()(x.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_new_weights_scale_nothing(name: str) -> None:
    """With and without the offset, a new norm gives vectors of size one, and its bias adds nothing."""
    module = NORMS[name](8)
    out = module(4 * tokens(3, 8, dtype=torch.float32) + 1)
    torch.testing.assert_close(out.square().mean(-1), torch.ones(3), atol=1e-4, rtol=0)
    assert not module.weight.any() if "unit" in name else bool((module.weight == 1).all())
    assert set(dict(module.named_parameters())) == (
        {"weight"} if "bias" in name or "rms" in name else {"weight", "bias"}
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_sixteen_bits_keep_their_dtype_and_form_sums_in_32(name: str, dtype: torch.dtype) -> None:
    """Squares past the largest float16, and sums over 4096 numbers that 8 bits cannot count: with weights that scale
    nothing, each output is off by no more than its own rounding."""
    module = NORMS[name](4096).to(dtype)
    for size in (3000.0, 1e-2):
        x = (size * (tokens(3, 4096) + 0.5)).to(dtype)
        out = module(x)
        assert out.dtype == dtype
        expected = each(partial(norm, module), x)
        rounding = torch.finfo(dtype).eps / 2
        # Formed in float32, so the odd number may fall on the other side of a tie; what is tiny is rounded coarsely.
        torch.testing.assert_close(out.double(), expected, atol=torch.finfo(dtype).tiny, rtol=1.01 * rounding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_sixteen_bits_with_any_weights(name: str, dtype: torch.dtype) -> None:
    """The factor is formed in float32 too, so that an output is off by its own rounding alone."""
    module = filled(name, 64, dtype)
    x = tokens(50, 64, seed=3, dtype=dtype)
    expected = each(partial(norm, module), x)
    torch.testing.assert_close(module(x).double(), expected, atol=1e-6, rtol=1.01 * torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("name", NORMS)
def test_a_stream_of_another_dtype_keeps_it(name: str) -> None:
    """As under autocast, where a 16-bit branch meets float32 weights: formed in float32, without a warning."""
    module = filled(name, 64, torch.float32)
    x = tokens(50, 64, seed=3, dtype=torch.bfloat16)
    assert torch.equal(module(x), module(x.float()).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), module(x.float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_a_stream_wider_than_the_weights_comes_out_in_theirs(name: str, dtype: torch.dtype) -> None:
    """As in T5 in float16, whose stream is float32: rounded once, at the end, for one token as for many."""
    module = filled(name, 64, dtype)
    x = 1e6 * tokens(2, 9, 64, seed=3, dtype=torch.float32)
    expected = each(partial(norm, module), x.double())
    with torch.no_grad():
        steps = torch.cat([module(token) for token in x.split(1, 1)], 1)
    for out in (module(x), steps):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1.01 * torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("name", NORMS)
def test_zeros_and_gradients(name: str) -> None:
    """A vector of zeros, as padding may be, has an output and gradients that are finite; elsewhere they are right."""
    module = filled(name, 5)
    zeros = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    out = module(zeros)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(tensor.grad.isfinite().all() for tensor in (zeros, *module.parameters()))
    assert torch.autograd.gradcheck(module, tokens(2, 5, seed=1).requires_grad_())


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("dim", {"dim": value}) for value in (0, -1, 2.0, "4", True)),
        *(("eps", {"eps": value}) for value in (-1e-6, math.nan, math.inf, -math.inf)),
    ],
    ids=str,
)
def test_refused(kind: type, name: str, options: dict) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name}: expected .*, got "):
        kind(**{"dim": 4, **options})


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_device_and_dtype_are_those_asked_for(kind: type) -> None:
    module = kind(4, device="meta", dtype=torch.bfloat16)
    assert {(parameter.device.type, parameter.dtype) for parameter in module.parameters()} == {("meta", torch.bfloat16)}
    assert kind(4, eps=0.0).eps == 0.0


@torch.no_grad()
def test_eps_is_read_at_each_call() -> None:
    """One token takes a way of its own: with the same eps, also one that was set later."""
    module, x = RMSNorm(8), 0.1 * torch.ones(1, 1, 8)
    module.eps = 0.5
    torch.testing.assert_close(module(x), x / (0.01 + 0.5) ** 0.5)
    torch.testing.assert_close(module(x), module(x.expand(1, 2, 8))[:, :1])
    assert not any(isinstance(value, torch.Tensor) for value in vars(module).values())


@pytest.mark.parametrize("name", NORMS)
def test_reset_weights_are_those_of_a_new_module(name: str) -> None:
    module = filled(name, 8, torch.float32)
    module.reset_parameters()
    for parameter, new in zip(module.parameters(), NORMS[name](8).parameters(), strict=True):
        assert torch.equal(parameter, new)


@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_one_graph_for_every_size(name: str) -> None:
    """No size is asked for while compiled, though eager steps of few rows have a way of their own."""
    torch._dynamo.reset()
    counter = CompileCounter()
    module = filled(name, 16, torch.float32)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for rows, length in ((2, 3), (3, 5), (9, 2), (40, 700)):
        x = torch.randn(rows, length, 16)
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=1e-5)
    assert counter.frame_count == 1
