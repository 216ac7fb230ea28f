"""The traced kernel: the eager one's numbers, in one graph for every length, in every machine that traces."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from transformer.kernels import Kernel, Sinks
from transformer.kernels.biases import as_bias, given_bias

HEADS, GROUPS, DIM = 4, 2, 8
OPTIONS: dict[str, dict[str, bool]] = {
    "all": {},
    "causal": {"causal": True},
    "mask": {"mask": True},
    "causal and mask": {"causal": True, "mask": True},
    "sinks": {"sinks": True},
    "weights": {"causal": True, "return_weights": True},
}
KERNELS = {"plain": Kernel(0.3), "softcap": Kernel(0.3, 5.0)}
TRACED = [
    ("plain", "all"),
    ("plain", "causal"),
    ("plain", "weights"),
    ("softcap", "causal and mask"),
    ("softcap", "sinks"),
]
"""Each kernel and each option at least once: tracing takes seconds, and does not look at how they go together."""


class Attending(nn.Module):
    """Heads split as attention modules split them, and the traced kernel over them."""

    def __init__(self, kernel: Kernel, causal: bool = False, mask: bool = False, sinks: bool = False, **options: bool):
        super().__init__()
        self.kernel, self.causal, self.mask, self.sinks, self.options = kernel, causal, mask, sinks, options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = split(query, key, value)
        return self.kernel(query, key, value, causal=self.causal, **self.given(query, key, value), traced=True)[0]

    def eager(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = split(query, key, value)
        given = self.given(query, key, value)
        if self.causal and given["bias"] is not None:
            given["bias"] = given["bias"] + as_bias(torch.ones(query.shape[2], key.shape[2]).tril() > 0)
        return self.kernel(query, key, value, causal=self.causal and given["bias"] is None, **given)[0]

    def given(self, query: Tensor, key: Tensor, value: Tensor) -> dict[str, object]:
        length, keys = query.shape[2], key.shape[2]
        seen = torch.ones(length, keys, dtype=torch.bool, device=query.device).triu(-1)
        return {
            "bias": as_bias(seen)[None, None] if self.mask else None,
            "sinks": Sinks(2 * query, key[:, :, :2], value[:, :, :2], None) if self.sinks else None,
            **self.options,
        }


def split(*given: Tensor) -> list[Tensor]:
    numbers = (HEADS, GROUPS, GROUPS)
    return [x.reshape(x.shape[0], x.shape[1], n, DIM).transpose(1, 2) for x, n in zip(given, numbers, strict=True)]


def inputs(length: int, rows: int = 2, device: str = "cpu") -> list[Tensor]:
    return [torch.randn(rows, length, number * DIM, device=device) for number in (HEADS, GROUPS, GROUPS)]


@pytest.fixture(params=OPTIONS)
def options(request: pytest.FixtureRequest) -> dict[str, bool]:
    return OPTIONS[request.param]


@pytest.fixture(params=KERNELS)
def module(request: pytest.FixtureRequest, options: dict[str, bool]) -> Attending:
    return Attending(KERNELS[request.param], **options)


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_equals_the_eager_kernel(module: Attending, grad: bool) -> None:
    """Over few keys, and over so many that the eager kernel chooses among its ways, as it does without gradients."""
    for length in (1, 5) if grad else (1, 5, 1500):
        given = inputs(length)
        with torch.set_grad_enabled(grad):
            close(module(*given), module.eager(*given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(module: Attending, dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in inputs(9)]
    out = module(*given)
    assert out.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), module.eager(*(x.double() for x in given)), rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "name"), TRACED)
def test_compiled_in_one_graph_for_every_length(kernel: str, name: str) -> None:
    torch._dynamo.reset()
    module = Attending(KERNELS[kernel], **OPTIONS[name])
    counter = CompileCounter()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for length in (5, 6, 30, 1500):
        given = inputs(length)
        close(compiled(*given), module(*given))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled_gradients(kernel: str) -> None:
    torch._dynamo.reset()
    module = Attending(KERNELS[kernel], causal=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length in (5, 6, 30):
        given = [x.requires_grad_() for x in inputs(length)]
        close(torch.autograd.grad(compiled(*given).sum(), given), torch.autograd.grad(module(*given).sum(), given))
    assert counter.frame_count == 2, "one of the first length, one of all others"


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "name"), TRACED)
@pytest.mark.parametrize("strict", [False, True])
def test_exported_for_every_batch_and_length(kernel: str, name: str, strict: bool) -> None:
    module = Attending(KERNELS[kernel], **OPTIONS[name])
    shape = {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("L", min=3, max=4096)}
    exported = torch.export.export(module, tuple(inputs(5)), dynamic_shapes=(shape,) * 3, strict=strict)
    for length, rows in ((9, 3), (1500, 1)):
        given = inputs(length, rows)
        close(exported.module()(*given), module(*given))


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "name"), [("plain", "causal and mask"), ("softcap", "sinks")])
def test_exported_to_onnx(kernel: str, name: str) -> None:
    module = Attending(KERNELS[kernel], **OPTIONS[name])
    shape = {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("L", min=3, max=4096)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(module, tuple(inputs(5)), dynamic_shapes=(shape,) * 3, dynamo=True, verbose=False)
    given = inputs(9, 3)
    assert program is not None
    close(program(*given)[0], module(*given))


@pytest.mark.slow
def test_a_bias_exported_to_onnx_in_16_bits() -> None:
    """A bias has the dtype of the queries there, and low numbers stay finite."""

    class Biased(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
            return KERNELS["plain"](query, key, value, given_bias(bias, query), traced=True)[0]

    given = [x.half() for x in split(*inputs(5))]
    bias = torch.zeros(1, 1, 5, 5)
    bias[..., 1] = bias[:, :, 3] = torch.finfo(torch.float32).min
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(Biased(), (*given, bias), dynamo=True, verbose=False)
    assert program is not None
    torch.testing.assert_close(program(*given, bias)[0][:, :, :3], Biased()(*given, bias)[:, :, :3], rtol=0, atol=2e-3)
    assert program(*given, bias)[0].isfinite().all()


def test_gradients_of_each_sample(module: Attending) -> None:
    """Without a warning that a batching rule is missing."""
    given = [torch.stack((x, 2 * x)) for x in inputs(5)]

    def total(*given: Tensor) -> Tensor:
        return module(*given).square().mean()

    gradients = torch.func.vmap(torch.func.grad(total, (0, 1, 2)))(*given)
    for sample in range(2):
        own = [x[sample].requires_grad_() for x in given]
        close([x[sample] for x in gradients], list(torch.autograd.grad(total(*own), own)))


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "name"), TRACED)
def test_a_compiled_vmap(kernel: str, name: str) -> None:
    torch._dynamo.reset()
    given = [torch.stack((x, 2 * x)) for x in inputs(5)]
    mapped = torch.func.vmap(Attending(KERNELS[kernel], **OPTIONS[name]))
    close(torch.compile(mapped, fullgraph=True, backend="eager")(*given), mapped(*given))


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_without_numbers(module: Attending, device: str, fake: bool) -> None:
    with FakeTensorMode() if fake else torch.enable_grad():
        given = [x.requires_grad_() for x in inputs(5, device=device)]
        out = module(*given)
        out.sum().backward()
    assert tuple(out.shape) == (2, HEADS, 5, DIM)
    assert all(x.grad is not None for x in given)


def test_traced_by_jit(module: Attending) -> None:
    """Without a warning that a size became a constant, so other sizes are right too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        traced = torch.jit.trace(module, tuple(inputs(5)))
    for length, rows in ((5, 2), (7, 3)):
        given = inputs(length, rows)
        close(traced(*given), module(*given))


def test_dropout_drops(module: Attending) -> None:
    given = split(*inputs(5))
    kept, dropped = (module.kernel(*given, dropout=share, traced=True)[0] for share in (0.0, 0.5))
    assert not torch.allclose(kept, dropped, atol=1e-3)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation gives."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.bytes = max(self.bytes, result.nbytes)
        return result


def test_keys_are_not_repeated_for_the_heads_of_their_group() -> None:
    query, key = torch.randn(1, 16, 2, 64), torch.randn(1, 1, 4096, 64)
    with Largest() as largest:
        KERNELS["softcap"](query, key, key, traced=True)
    assert largest.bytes <= max(key.nbytes, 4 * 16 * 2 * 4096)
