"""Switches of PyTorch: they select kernels, and each private operator has a public alternative."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.internals import as_where_mkl_is_slow, matmul_tiles
from transformer import DecoderOnlyTransformer, GroupQueryAttention
from transformer.errors import DtypeError
from transformer.kernels import Kernel, private_operators
from transformer.kernels.biases import as_bias
from transformer.kernels.cpu_linear import project
from transformer.kernels.private_operators import has_operator
from transformer.kernels.tuning import DEFAULT
from transformer.positions import RotaryEmbedding

FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
ONEDNN = "mkldnn::_linear_pointwise"


class Operators(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().removesuffix(".default"))
        return func(*args, **(kwargs or {}))


class Public(TorchFunctionMode):
    """How often `scaled_dot_product_attention` was called."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Keys are split for several threads alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch without the private operators."""
    monkeypatch.setattr(private_operators, "ONEDNN_LINEAR", False)
    monkeypatch.setattr(private_operators, "SDPA_WITH_LSE", False)


def heads(number: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, number, length, 8).to(dtype)


def keys_in_parts(dtype: torch.dtype) -> Callable[[], Tensor]:
    query, key = heads(4, 1, dtype), heads(1, DEFAULT.min_split_keys + 3, dtype)
    return lambda: Kernel(0.3)(query, key, key)[0]


def products_of_few(dtype: torch.dtype) -> Callable[[], Tensor]:
    query, key = heads(2, 1, dtype), heads(2, DEFAULT.min_matmul_keys + 3, dtype)
    return lambda: Kernel(0.3)(query, key, key)[0]


def masked(dtype: torch.dtype) -> Callable[[], Tensor]:
    query, key = heads(4, 3, dtype), heads(2, DEFAULT.min_matmul_keys + 3, dtype)
    bias = as_bias(torch.ones(3, key.shape[2]).tril(DEFAULT.min_matmul_keys) > 0)
    return lambda: Kernel(0.3)(query, key, key, bias)[0]


def chunk(dtype: torch.dtype) -> Callable[[], Tensor]:
    query, key = heads(4, 70, dtype), heads(2, DEFAULT.min_prefix + 70, dtype)
    return lambda: Kernel(0.3)(query, key, key, causal=True)[0]


CALLS = [keys_in_parts, products_of_few, masked, chunk]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", CALLS)
@torch.no_grad()
def test_a_choice_among_backends_is_sdpa_s(
    make: Callable, dtype: torch.dtype, backend: SDPBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make(dtype)
    with Public() as public:
        expected = call()
    assert public.calls == 0 or dtype is torch.bfloat16

    def never(*_: object) -> None:
        raise AssertionError("something stood in for SDPA")

    monkeypatch.setattr(private_operators, "sdpa_with_lse", never)
    matmul_tiles(monkeypatch, never)
    with sdpa_kernel(backend), Public() as public, Operators() as operators:
        found = call()
    assert public.calls == 1
    assert (FLASH in operators.names) == (backend is SDPBackend.FLASH_ATTENTION)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype is torch.float32 else 2e-2)


@torch.no_grad()
def test_a_choice_among_backends_reaches_whole_modules() -> None:
    """Prefill, a chunk over many held keys, and single steps, as with every backend."""
    module = GroupQueryAttention(32, 4, 2, True, True, position=RotaryEmbedding(8)).eval()
    held, x = DEFAULT.min_prefix + 3, torch.randn(1, DEFAULT.min_prefix + 80, 32)
    outs = []
    for backends in ([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], [SDPBackend.MATH]):
        module.kv_cache = None
        with sdpa_kernel(backends), Operators() as operators:
            outs.append(torch.cat([module(part) for part in x.split([held, 76, 1], 1)], 1))
        assert (FLASH in operators.names) == (len(backends) > 1)
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-5)


def test_a_choice_holds_while_compiled() -> None:
    kernel, query, key = Kernel(0.3), heads(4, 1), heads(2, DEFAULT.min_matmul_keys + 3)
    graphs = []

    def backend(graph, _inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    with torch.no_grad():
        for chosen in ([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], [SDPBackend.MATH]):
            torch._dynamo.reset()
            with sdpa_kernel(chosen):
                torch.compile(lambda: kernel(query, key, key)[0], fullgraph=True, backend=backend)()
    assert [any("scaled_dot_product" in name for name in names) for names in graphs] == [False, True]


# --- oneDNN ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # from the switch itself, on machines without Intel's GPUs
@torch.no_grad()
def test_onednn_is_off_where_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    as_where_mkl_is_slow(monkeypatch)
    layer, x = torch.nn.Linear(512, 512), torch.randn(1, 9, 512)
    with Operators() as on:
        expected = project(layer, x)
    with torch.backends.mkldnn.flags(enabled=False), Operators() as off:
        found = project(layer, x)
    assert (ONEDNN in on.names) == private_operators.ONEDNN_LINEAR
    assert not any(name.startswith("mkldnn") for name in off.names)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # from the switch itself, on machines without Intel's GPUs
@torch.no_grad()
def test_onednn_is_off_for_long_products_too() -> None:
    query, key = heads(4, 3), heads(1, DEFAULT.min_onednn_keys + 1)
    bias = as_bias(torch.ones(3, key.shape[2]).tril(DEFAULT.min_onednn_keys - 3) > 0)
    with Operators() as on:
        expected = Kernel(0.3)(query, key, key, bias)[0]
    with torch.backends.mkldnn.flags(enabled=False), Operators() as off:
        found = Kernel(0.3)(query, key, key, bias)[0]
    assert (ONEDNN in on.names) == private_operators.ONEDNN_LINEAR
    assert ONEDNN not in off.names
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- private operators ----------------------------------------------------------------------------------------------


def test_an_operator_is_looked_for_by_its_whole_schema() -> None:
    assert has_operator("aten::relu", "(Tensor self) -> Tensor")
    assert not has_operator("aten::relu", "(Tensor self, bool more) -> Tensor")
    assert not has_operator("aten::no_such_operator", "(Tensor self) -> Tensor")
    assert not has_operator("nowhere::relu", "(Tensor self) -> Tensor")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", CALLS)
@torch.no_grad()
def test_kernels_without_private_operators(make: Callable, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    call = make(dtype)
    expected = call()
    request.getfixturevalue("hidden")
    with Operators() as operators:
        found = call()
    assert ONEDNN not in operators.names
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype is torch.float32 else 2e-2)


def test_models_without_private_operators(request: pytest.FixtureRequest) -> None:
    model = DecoderOnlyTransformer(64, 512, 4, 512, 2, attention="mqa").eval()
    ids = torch.randint(64, (1, DEFAULT.min_prefix + 80))
    with torch.no_grad():
        logits, tokens = model(ids), model.generate(ids, max_new_tokens=3)
        request.getfixturevalue("hidden")
        torch.testing.assert_close(model(ids), logits, rtol=0, atol=1e-4)
    assert torch.equal(model.generate(ids, max_new_tokens=3), tokens)


# --- deterministic mode ---------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


OPTIONS: dict[str, dict[str, object]] = {
    "rotary": {"attention": "gqa", "num_groups": 2},
    "window": {"window_size": 4, "num_sinks": 1, "softcap": 5.0},
    "relative": {"position": "relative"},
    "learned": {"position": "learned", "max_length": 64, "norm": "layer"},
}


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("options", OPTIONS)
def test_deterministic_mode_runs_and_gives_equal_bits(options: str) -> None:
    """Uninitialised memory is then filled with NaN, which nothing may read."""
    model = DecoderOnlyTransformer(50, 256, 4, 512, 2, **OPTIONS[options]).eval()
    ids = torch.randint(50, (2, 9))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0]])
    runs = []
    for _ in range(2):
        model.zero_grad()
        logits = model(ids, mask)
        logits.square().mean().backward()
        tokens = model.generate(ids, max_new_tokens=5)
        runs.append([logits.detach(), tokens, *(parameter.grad for parameter in model.parameters())])
    assert all(bool(tensor.isfinite().all()) for tensor in runs[0])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_the_same_throughout_a_conversation(inside: bool) -> None:
    """A conversation that begins inside autocast continues inside, and otherwise outside; else it is refused without
    changes."""
    model = DecoderOnlyTransformer(50, 32, 4, 64, 2, attention="gqa", num_groups=2).eval()
    ids = torch.randint(50, (2, 9))
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        expected = model.generate(ids, max_new_tokens=6)
        model.enable_cache()
        assert torch.equal(model.generate(ids, max_new_tokens=3), expected[:, :12])
    assert {cache["key"].dtype for cache in model.kv_cache.layers.values()} == {
        torch.bfloat16 if inside else torch.float32
    }
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=not inside),
        torch.no_grad(),
        pytest.raises(DtypeError, match=r"kv_cache\.to\(dtype="),
    ):
        model(ids[:, :1])
    assert model.kv_cache.length == 12
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        model.generate(ids[:, :1], max_new_tokens=2)
    assert model.kv_cache.length == 15
