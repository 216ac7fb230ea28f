"""The quick ways are the linear itself, and step aside for everything that is more than weights."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn.utils import parametrize

from transformer import GroupQueryAttention
from transformer.attention import onednn, projection
from transformer.attention.projection import lay_side_by_side, project, project_together
from transformer.blocks import GatedFeedForward


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(512, 512, bias)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which quick ways were taken."""
    taken, product, by_onednn = [], projection._product, onednn.linear
    monkeypatch.setattr(projection, "_product", lambda *arguments: taken.append("slices") or product(*arguments))
    monkeypatch.setattr(onednn, "linear", lambda *arguments: taken.append("oneDNN") or by_onednn(*arguments))
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
        lambda layer: layer.double(),
    ],
    ids=["forward hook", "pre-hook", "parametrization", "patched forward", "float64"],
)
@pytest.mark.parametrize("rows", [1, 9])
@torch.no_grad()
def test_more_than_weights_goes_through_the_module(rows: int, change: object, quick: list[str]) -> None:
    layer = linear()
    change(layer)
    x = torch.randn(1, rows, 512, dtype=next(layer.parameters()).dtype)
    assert torch.equal(project(layer, x), layer(x))
    assert not quick


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
    monkeypatch.setattr(onednn, "AVAILABLE", False)
    project(linear(), torch.randn(1, 9, 512))
    assert not quick


@pytest.mark.parametrize(("width", "most"), [(512, 6), (1024, 3), (1536, 2), (4096, 1)])
@torch.no_grad()
def test_the_wider_the_fewer_rows_are_sliced(width: int, most: int, quick: list[str]) -> None:
    for rows in (most, most + 1):
        layer, x = nn.Linear(width, 512), torch.randn(rows, 1, width)
        torch.testing.assert_close(project(layer, x), layer(x), rtol=0, atol=1e-5)
    assert quick == ["slices", "oneDNN"]


# --- several projections of one input ----------------------------------------------------------------------------


def three(bias: bool = True) -> list[nn.Linear]:
    return [nn.Linear(512, width, bias) for width in (512, 96, 96)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (2, 1)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_together_equals_one_by_one(shape: tuple[int, int], bias: bool, quick: list[str]) -> None:
    layers, x = three(bias), torch.randn(*shape, 512)
    joint = project_together(layers, x)
    torch.testing.assert_close(joint, torch.cat([layer(x) for layer in layers], -1), rtol=0, atol=1e-5)
    assert len(quick) == 1


CHANGES: dict[str, Callable[[list[nn.Linear]], object]] = {
    "one weight in two places": lambda layers: setattr(layers[1], "weight", layers[2].weight),
    "memory of several processes": lambda layers: [layer.share_memory() for layer in layers],
    "no bias": lambda layers: setattr(layers[2], "bias", None),
    "another module": lambda layers: layers.__setitem__(1, nn.Sequential(layers[1])),
    "hook": lambda layers: layers[2].register_forward_hook(lambda _module, _inputs, out: out + 1),
    "parametrization": lambda layers: parametrize.register_parametrization(layers[0], "weight", Doubled()),
    "float64": lambda layers: [layer.double() for layer in layers],
}


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: setattr(layers[1], "weight", nn.Parameter(0.05 * torch.randn(96, 512))),
        lambda layers: setattr(layers[1], "bias", nn.Parameter(torch.randn(96))),
        lambda layers: layers.reverse(),
    ],
    ids=["another weight", "another bias", "another order"],
)
@torch.no_grad()
def test_what_lies_elsewhere_now_is_laid_out_anew(change: Callable[[list[nn.Linear]], object]) -> None:
    layers, x = three(), torch.randn(1, 1, 512)
    project_together(layers, x)
    change(layers)
    expected = torch.cat([layer(x) for layer in layers], -1)
    torch.testing.assert_close(project_together(layers, x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_is_more_than_weights_side_by_side_is_called_one_by_one(change: str) -> None:
    layers = three()
    CHANGES[change](layers)
    assert project_together(layers, torch.randn(1, 1, 512, dtype=next(layers[0].parameters()).dtype)) is None


@torch.no_grad()
def test_many_rows_small_weights_and_gradients_are_not_read_together() -> None:
    layers, x = three(), torch.randn(1, 1, 512)
    assert project_together(layers, torch.randn(1, 7, 512)) is None
    with torch.enable_grad():
        assert project_together(layers, x) is None
    small = [nn.Linear(64, 64), nn.Linear(64, 64)]
    assert project_together(small, torch.randn(1, 1, 64)) is None


def test_laid_out_parameters_are_what_they_were() -> None:
    """The same objects with the same numbers, so that optimisers and tied weights notice nothing."""
    layers = [nn.Linear(512, width) for width in (512, 96, 96)]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    numbers = [parameter.detach().clone() for parameter in parameters]
    lay_side_by_side(layers)
    assert all(a is b for a, b in zip(parameters, (p for layer in layers for p in layer.parameters()), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parameters, numbers, strict=True))
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    sum(layer(torch.ones(1, 512)).sum() for layer in layers).backward()
    optimizer.step()
    for parameter, before in zip(parameters, numbers, strict=True):
        torch.testing.assert_close(parameter.detach(), before - 1)


@torch.no_grad()
def test_buffers_that_meet_by_chance_are_not_one() -> None:
    """Two allocations may follow each other in memory: here two views of one block that know only their own half."""
    block = torch.randn(2 * 256, 512)
    halves = [torch.from_numpy(part) for part in block.numpy().reshape(2, 256, 512)]
    layers = [nn.Linear(512, 256, bias=False) for _ in halves]
    for layer, half in zip(layers, halves, strict=True):
        layer.weight = nn.Parameter(half)
    assert halves[0].data_ptr() + halves[0].nbytes == halves[1].data_ptr()
    x = torch.randn(1, 1, 512)
    joint = project_together(layers, x)
    torch.testing.assert_close(joint, torch.cat([layer(x) for layer in layers], -1), rtol=0, atol=1e-3)


def test_one_module_in_two_places_stays_as_it_is() -> None:
    layer = linear()
    before = layer.weight.data_ptr()
    lay_side_by_side([layer, layer])
    assert layer.weight.data_ptr() == before


def assigned(module: nn.Module) -> nn.Module:
    module.load_state_dict({name: tensor.clone() for name, tensor in module.state_dict().items()}, assign=True)
    return module


def through_a_file(module: nn.Module) -> nn.Module:
    """Weights that share a buffer without overlapping are separate tensors to a file."""
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
    module = GroupQueryAttention(512, 8, 2) if kind == "attention" else GatedFeedForward(512, 512)
    x = torch.randn(1, 1, 512)
    expected = module(x)
    count = len(quick)
    assert count == 2, "one product for what reads x, and one for the way out"
    changed = DETOURS[detour](module)
    out = changed(x)
    assert len(quick) == 2 * count
    if detour != "from meta":
        assert torch.equal(out, expected)


@pytest.mark.parametrize("built_in_inference_mode", [False, True])
def test_modules_built_or_loaded_in_inference_mode_work_where_their_weights_do(built_in_inference_mode: bool) -> None:
    x = torch.randn(1, 1, 512)
    with torch.inference_mode(built_in_inference_mode):
        module = GroupQueryAttention(512, 8, 2)
    with torch.inference_mode():
        module.load_state_dict(GroupQueryAttention(512, 8, 2).state_dict())
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
        within, x = GroupQueryAttention(512, 8, 2), torch.randn(1, 9, 512)
        within.q_proj(x)
        out = within(x)
    outside = GroupQueryAttention(512, 8, 2)
    outside.load_state_dict({name: tensor.clone() for name, tensor in within.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(outside(x.clone()), out)
