"""The quick ways are the linear itself, and step aside for everything that is more than weights."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize

from tests.internals import as_where_mkl_is_slow, sliced_products, without_compiled_kernels
from transformer import GroupQueryAttention
from transformer.blocks import GatedFeedForward
from transformer.kernels import private_operators
from transformer.kernels.cpu_linear import plain_linear_weight, project


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(512, 512, bias)


@pytest.fixture(autouse=True)
def _without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiled_kernels(monkeypatch)
    as_where_mkl_is_slow(monkeypatch)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which quick ways were taken."""
    taken, onednn_linear = [], private_operators.onednn_linear
    sliced_products(monkeypatch, lambda: taken.append("slices"))
    monkeypatch.setattr(
        private_operators, "onednn_linear", lambda *given: taken.append("oneDNN") or onednn_linear(*given)
    )
    return taken


@pytest.mark.parametrize(
    ("shape", "way"),
    [
        ((1, 1), "slices"),
        ((1, 3), "slices"),
        ((3, 1), "slices"),
        ((1, 7), "oneDNN"),
        ((2, 5), "oneDNN"),
        ((3, 99), "oneDNN"),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_equals_the_linear(shape: tuple[int, int], way: str, bias: bool, quick: list[str]) -> None:
    layer, x = linear(bias), torch.randn(*shape, 512)
    torch.testing.assert_close(project(layer, x), layer(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(project(layer, x[:, :, ::1].clone().mT.contiguous().mT), layer(x), rtol=0, atol=1e-5)
    assert quick == [way, way]


@pytest.mark.parametrize("rows", [1, 9])
@torch.no_grad()
def test_equal_inputs_give_equal_bits(rows: int) -> None:
    layer, x = linear(), torch.randn(1, rows, 512)
    assert torch.equal(project(layer, x), project(layer, x.clone()))


class Tagged(torch.Tensor):
    """As quantised and sharded weights are: a class of its own."""


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda _module, _inputs, out: out + 1),
        lambda layer: layer.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 1,)),
        lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
        lambda layer: setattr(layer, "forward", lambda x: x + 1),
        lambda layer: setattr(layer, "weight", nn.Parameter(Tagged(layer.weight.detach()))),
        lambda layer: layer.double(),
    ],
    ids=["forward hook", "pre-hook", "parametrization", "patched forward", "weight of another class", "float64"],
)
@pytest.mark.parametrize("rows", [1, 9])
@torch.no_grad()
def test_more_than_weights_goes_through_the_module(rows: int, change: object, quick: list[str]) -> None:
    layer = linear()
    change(layer)
    x = torch.randn(1, rows, 512, dtype=next(layer.parameters()).dtype)
    assert torch.equal(project(layer, x), layer(x))
    assert not quick
    plain = type(layer) is nn.Linear and next(layer.parameters()).dtype is torch.float64
    assert (plain_linear_weight(layer) is not None) == plain


@pytest.mark.parametrize("rows", [1, 9])
@torch.no_grad()
def test_hooks_of_every_module_are_called(rows: int, quick: list[str]) -> None:
    layer, x, met = linear(), torch.randn(1, rows, 512), []
    with nn.modules.module.register_module_forward_hook(lambda module, _inputs, _out: met.append(module)):
        project(layer, x)
        assert plain_linear_weight(layer) is None
    assert met == [layer]
    assert not quick


@pytest.mark.parametrize("rows", [1, 9])
@torch.no_grad()
def test_tensors_of_another_class_go_through_the_module(rows: int, quick: list[str]) -> None:
    project(linear(), torch.randn(1, rows, 512).as_subclass(Tagged))
    assert not quick


@pytest.mark.parametrize("rows", [1, 9])
@torch.no_grad()
def test_a_width_that_does_not_fit_is_the_linear_s_own_error(rows: int) -> None:
    """Half of the width would fit the slices."""
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        project(linear(), torch.randn(1, rows, 256))


def test_what_is_a_plain_linear() -> None:
    layer = linear()
    assert plain_linear_weight(layer) is layer.weight
    assert plain_linear_weight(nn.Sequential(layer)) is None
    assert plain_linear_weight(nn.LazyLinear(3)) is None
    layer.weight = nn.Parameter(torch.ones(512, 512, dtype=torch.int8), requires_grad=False)
    assert plain_linear_weight(layer) is None


def products_in(layer: nn.Module, x: torch.Tensor) -> list[str]:
    """The products that a graph of fixed shape compiles to, by name."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(lambda x: project(layer, x), fullgraph=True, dynamic=False, backend=backend)(x)
        torch.testing.assert_close(out, layer(x), rtol=0, atol=1e-5)
    called = [str(node.target) for node in graphs[0].graph.nodes]
    return [name for name in ("baddbmm", "linear") if any(name in target for target in called)]


@pytest.mark.parametrize(("rows", "product"), [(1, "baddbmm"), (2, "baddbmm"), (9, "linear")])
def test_compiled_steps_of_few_rows_are_sliced(rows: int, product: str) -> None:
    assert products_in(linear(), torch.randn(1, rows, 512)) == [product]


def test_a_length_that_a_graph_leaves_open_is_not_asked_about() -> None:
    counter = CompileCounter()
    layer = linear()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: project(layer, x), fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for length in (2, 3, 9, 700):
            compiled(torch.randn(1, length, 512))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_exported_projections_are_the_linear(strict: bool) -> None:
    exported = torch.export.export(Projected(), (torch.randn(1, 1, 512),), strict=strict)
    assert [str(node.target) for node in exported.graph.nodes if node.op == "call_function"] == ["aten.linear.default"]


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return project(self.layer, x)


@pytest.mark.parametrize("rows", [1, 9])
def test_recorded_gradients_go_through_the_module(rows: int, quick: list[str]) -> None:
    layer = linear()
    project(layer, torch.randn(1, rows, 512)).sum().backward()
    assert layer.weight.grad is not None
    assert not quick


@torch.no_grad()
def test_nothing_and_small_weights_go_through_the_module(quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert project(nn.Linear(512, 511), torch.randn(1, 0, 512)).shape == (1, 0, 511)
    project(nn.Linear(64, 64), torch.randn(1, 1, 64))
    project(nn.Linear(64, 64), torch.randn(1, 9, 64))
    monkeypatch.setattr(private_operators, "ONEDNN_LINEAR", False)
    project(linear(), torch.randn(1, 9, 512))
    assert not quick


@pytest.mark.parametrize(("width", "most"), [(512, 6), (1024, 3), (1536, 2), (4096, 1)])
@torch.no_grad()
def test_the_wider_the_fewer_rows_are_sliced(width: int, most: int, quick: list[str]) -> None:
    for rows in (most, most + 1):
        layer, x = nn.Linear(width, 512), torch.randn(rows, 1, width)
        torch.testing.assert_close(project(layer, x), layer(x), rtol=0, atol=1e-5)
    assert quick == ["slices", "oneDNN"]


def assigned(module: nn.Module) -> nn.Module:
    module.load_state_dict({name: tensor.clone() for name, tensor in module.state_dict().items()}, assign=True)
    return module


def through_a_file(module: nn.Module) -> nn.Module:
    module.load_state_dict(load(save(module.state_dict())))
    return module


def moved_in_inference_mode(module: nn.Module) -> nn.Module:
    with torch.inference_mode():
        return module.to(torch.float32)


DETOURS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "new": lambda module: module,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "to and back": lambda module: module.double().float(),
    "inference mode": moved_in_inference_mode,
    "from meta": lambda module: module.to("meta").to_empty(device="cpu"),
    "assigned": assigned,
    "file": through_a_file,
}


@pytest.mark.parametrize("detour", DETOURS)
@pytest.mark.parametrize("kind", ["attention", "feed-forward"])
@torch.no_grad()
def test_modules_read_alike_whichever_way_they_came(kind: str, detour: str, quick: list[str]) -> None:
    """Equal weights give equal bits: whichever way a module came by them, it reads them in the same way."""
    torch.manual_seed(0)
    module = GroupQueryAttention(512, 8, 4) if kind == "attention" else GatedFeedForward(512, 512)
    x = torch.randn(1, 1, 512)
    expected = module(x)
    count = len(quick)
    assert count == 4 - (kind == "feed-forward"), "one product for each projection"
    changed = DETOURS[detour](module)
    out = changed(x)
    assert len(quick) == 2 * count
    if detour != "from meta":
        assert torch.equal(out, expected)


@pytest.mark.parametrize("built_in_inference_mode", [False, True])
def test_modules_built_or_loaded_in_inference_mode_work_where_their_weights_do(built_in_inference_mode: bool) -> None:
    x = torch.randn(1, 1, 512)
    with torch.inference_mode(built_in_inference_mode):
        module = GroupQueryAttention(512, 8, 4)
    with torch.inference_mode():
        module.load_state_dict(GroupQueryAttention(512, 8, 4).state_dict())
        expected = module(x)
    if built_in_inference_mode:
        return
    module(x).sum().backward()
    assert module.q_proj.weight.grad is not None
    with torch.no_grad():
        assert torch.equal(module(x), expected)


def test_weights_made_in_inference_mode_are_read_like_others() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        within, x = GroupQueryAttention(512, 8, 4), torch.randn(1, 9, 512)
        within.q_proj(x)
        out = within(x)
    outside = GroupQueryAttention(512, 8, 4)
    outside.load_state_dict({name: tensor.clone() for name, tensor in within.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(outside(x.clone()), out)
