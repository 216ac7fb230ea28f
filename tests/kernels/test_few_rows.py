"""Few rows times matrices by compiled kernels: each dtype against float64, int8 as torchao stores it, and who asks."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from tests.internals import without_compiled_kernels
from transformer.kernels import backend, few_rows, project, project_together, tuned
from transformer.kernels.compiled import are_available
from transformer.kernels.few_rows import project_few_rows
from transformer.kernels.linear_weights import linear_weight
from transformer.kernels.tuning import DEFAULT

pytestmark = pytest.mark.skipif(not are_available(), reason="numba is missing, or turned off")

DTYPES = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Of the largest result: float32's promise, and half a step of the 16-bit dtypes."""


def exact(layer: nn.Linear, x: Tensor) -> Tensor:
    out = x.double() @ layer.weight.double().T
    return out if layer.bias is None else out + layer.bias.double()


def far(out: Tensor, right: Tensor) -> float:
    """The largest error as a share of the largest result."""
    return float((out.double() - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 2), (3, 1), (2, 2), (1, 5), (4, 2)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_each_dtype_is_rounded_once(dtype: torch.dtype, batch: int, length: int, bias: bool) -> None:
    """Sums in float32: what is between them and float64 is the rounding of the result."""
    layers = tuple(nn.Linear(96, outputs, bias, dtype=dtype) for outputs in (7, 64, 130, 1))
    x = torch.randn(batch, length, 96, dtype=dtype)
    for threads in (1, 2):
        with tuned(min_parallel_bytes=0 if threads == 2 else 1 << 40):
            outs = project_few_rows(layers, x)
        for layer, out in zip(layers, outs, strict=True):
            assert out.dtype is dtype
            assert out.shape == (batch, length, layer.out_features)
            assert far(out, exact(layer, x)) <= ROUNDING[dtype] + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_odd_widths_and_views(dtype: torch.dtype) -> None:
    for width, rows in itertools.product((1, 3, 17, 100), (1, 4)):
        layer, x = nn.Linear(width, 5, dtype=dtype), torch.randn(width, rows, 1, dtype=dtype).transpose(0, 2)
        (out,) = project_few_rows((layer,), x)
        assert (out.double() - exact(layer, x)).abs().max() <= ROUNDING[dtype] * max(exact(layer, x).abs().max(), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_nan_and_infinity_stay(dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 4, False, dtype=dtype)
    layer.weight.fill_(1.0)
    layer.weight[0, 3], layer.weight[1, 3], layer.weight[2, 3] = float("nan"), float("inf"), float("-inf")
    for rows in (1, 4):
        (out,) = project_few_rows((layer,), torch.ones(1, rows, 64, dtype=dtype))
        assert out[..., 0].isnan().all()
        assert out[..., 1].eq(float("inf")).all()
        assert out[..., 2].eq(float("-inf")).all()
        assert out[..., 3].eq(64.0).all()


@torch.no_grad()
def test_sums_beyond_bfloat16_are_rounded_as_torch_rounds() -> None:
    """Ties to even, NaN with any bits, and what is larger than every number: infinity."""
    layer = nn.Linear(1, 1, False, dtype=torch.bfloat16)
    numbers = torch.tensor([1.00390625, 1.01171875, 3.3e38, -3.3e38, 1e-40, float("nan"), -0.0])
    layer.weight.fill_(1.0)
    bias = nn.Linear(1, 8, True)
    bias.weight.zero_()
    for number in numbers.tolist():
        bias.bias.fill_(number)
        (out,) = project_few_rows((bias,), torch.ones(1, 1, 1))
        torch.testing.assert_close(out, torch.full((1, 1, 8), number), rtol=0, atol=0, equal_nan=True)


def quantized(layer: nn.Linear, groups: int | None = None) -> nn.Linear:
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, quantize_

    granularity = {} if groups is None else {"granularity": PerGroup(layer.in_features // groups)}
    quantize_(nn.Sequential(layer), Int8WeightOnlyConfig(**granularity))
    return layer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("rows", [1, 3, 8, 13])
@torch.no_grad()
def test_int8_of_torchao_is_its_dequantized_weights(dtype: torch.dtype, groups: int | None, rows: int) -> None:
    layer, x = quantized(nn.Linear(96, 40, dtype=dtype), groups), torch.randn(1, rows, 96, dtype=dtype)
    outs = project_few_rows((layer,), x)
    if rows > DEFAULT.max_few_rows and dtype is not torch.float32:
        assert outs is None, "torchao has a kernel of its own"
        return
    (out,), stored = outs, layer.weight
    each = stored.qdata.double().view(40, groups or 1, -1) * stored.scale.double().view(40, groups or 1, 1)
    right = x.double() @ each.view(40, 96).T + layer.bias.double()
    assert far(out, right) <= ROUNDING[dtype] + 1e-6


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_zero_points_of_int8_count() -> None:
    layer, x = quantized(nn.Linear(96, 40)), torch.randn(1, 3, 96)
    stored = layer.weight
    stored.zero_point.copy_(torch.arange(-20, 20, dtype=torch.int8).view(40, 1))
    (out,) = project_few_rows((layer,), x)
    right = (stored.qdata.double() - stored.zero_point.double()) * stored.scale.double()
    assert far(out, x.double() @ right.T + layer.bias.double()) <= 2e-6


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_quantized_activations_are_left_to_torchao() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = nn.Linear(96, 40)
    quantize_(nn.Sequential(layer), Int8DynamicActivationInt8WeightConfig())
    assert linear_weight(layer, torch.float32) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["zero_point", "act_pre_scale", "act_quant_kwargs", "block_size", "scale", "qdata"])
@torch.no_grad()
def test_int8_of_another_torchao_is_left_to_it(name: str) -> None:
    """Whose class names its parts otherwise."""
    layer = quantized(nn.Linear(96, 40))
    assert linear_weight(layer, torch.float32) is not None
    delattr(layer.weight, name)
    assert linear_weight(layer, torch.float32) is None


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("width", [64, 1024])
@torch.no_grad()
def test_sparse_weights_are_left_to_the_layer(width: int) -> None:
    """Which PyTorch's linear multiplies, in some layouts; a sparse tensor raises where it is asked for its strides."""
    layer, x = nn.Linear(width, width, bias=False), torch.randn(1, 2, width)
    right = layer(x)
    layer.weight = nn.Parameter(layer.weight.to_sparse_csr(), requires_grad=False)
    assert linear_weight(layer, torch.float32) is None
    torch.testing.assert_close(project(layer, x), right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 20])
@torch.no_grad()
def test_tangents_pass_by_the_kernels(rows: int) -> None:
    """Forward-mode derivatives are also formed where gradients are off, in oneDNN's linear of many rows, too."""
    layer, x, tangent = nn.Linear(1024, 1024), torch.randn(1, rows, 1024), torch.randn(1, rows, 1024)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        assert project_few_rows((layer,), dual) is None
        _, out = forward_ad.unpack_dual(project(layer, dual))
    torch.testing.assert_close(out, nn.functional.linear(tangent, layer.weight), rtol=0, atol=1e-5)
    assert project_few_rows((layer,), x[:, :1]) is not None


class Counter(TorchDispatchMode):
    """Counts operations, as a profiler of arithmetic does."""

    counted = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counted += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_who_counts_operations_sees_them() -> None:
    layer, x = nn.Linear(256, 256), torch.randn(1, 1, 256)
    assert project_few_rows((layer,), x) is not None
    with Counter() as seen:
        project(layer, x)
    assert seen.counted


def test_what_is_left_to_the_layers() -> None:
    """Gradients, autocast, a backend that is asked for, more rows than few, float64, layers that are not plain."""
    layer, x = nn.Linear(64, 64), torch.randn(1, 2, 64)
    assert project_few_rows((layer,), x) is None, "gradients are recorded"
    with torch.no_grad():
        assert project_few_rows((layer,), x) is not None
        with backend("sdpa"):
            assert project_few_rows((layer,), x) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert project_few_rows((layer,), x) is None
        assert project_few_rows((layer,), torch.randn(3, 3, 64)) is None
        assert project_few_rows((layer,), torch.randn(1, 0, 64)) is None
        assert project_few_rows((layer,), x.double()) is None
        assert project_few_rows((layer, nn.Identity()), x) is None
        assert project_few_rows((layer,), x[..., :32]) is None
        with torch.device("meta"):
            assert project_few_rows((nn.Linear(64, 64),), torch.randn(1, 1, 64)) is None
        hook = layer.register_forward_hook(lambda _module, _inputs, out: out + 1)
        assert project_few_rows((layer,), x) is None
        hook.remove()
        assert project_few_rows((layer,), x) is not None


@torch.no_grad()
def test_without_numba_it_is_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(256, 256), torch.randn(1, 1, 256)
    compiled = project(layer, x)
    without_compiled_kernels(monkeypatch)
    assert project_few_rows((layer,), x) is None
    torch.testing.assert_close(project(layer, x), compiled, rtol=0, atol=1e-5)


@torch.no_grad()
def test_together_is_each_alone() -> None:
    layers, x = tuple(nn.Linear(256, outputs) for outputs in (256, 64, 64)), torch.randn(2, 1, 256)
    for out, layer in zip(project_together(layers, x), layers, strict=True):
        torch.testing.assert_close(out, layer(x), rtol=0, atol=1e-5)
    mixed = (layers[0], nn.Sequential(layers[1]))
    with mock.patch.object(nn.Sequential, "forward", lambda self, given: self[0](given) + 1):
        assert torch.equal(project_together(mixed, x)[1], layers[1](x) + 1)


@pytest.mark.parametrize(
    ("rows", "numbers", "expected"), [(1, 96, True), (2, 192, True), (2, 191, False), (3, 287, False)]
)
@torch.no_grad()
def test_more_numbers_than_few_go_to_the_linear(
    rows: int, numbers: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PyTorch's own is quick; int8 weights are read as they are in any case."""
    monkeypatch.setattr(few_rows, "FAST_DTYPES", {torch.float32})
    layer, x = nn.Linear(96, 40), torch.randn(1, rows, 96)
    with tuned(max_few_rows_numbers=numbers):
        assert (project_few_rows((layer,), x) is not None) is expected
        assert project_few_rows((layer.bfloat16(),), x.bfloat16()) is not None
