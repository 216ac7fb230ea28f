"""The quick product of few rows is the linear itself, and steps aside for everything that is more than weights."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from transformer.attention import projection
from transformer.attention.projection import project


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(512, 512, bias)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often the quick way was taken."""
    taken, original = [], projection._few_rows
    monkeypatch.setattr(projection, "_few_rows", lambda *arguments: taken.append(1) or original(*arguments))
    return taken


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_equals_the_linear(shape: tuple[int, int], bias: bool, quick: list[int]) -> None:
    layer, x = linear(bias), torch.randn(*shape, 512)
    torch.testing.assert_close(project(layer, x), layer(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(project(layer, x[:, :, ::1].clone().mT.contiguous().mT), layer(x), rtol=0, atol=1e-5)
    assert len(quick) == 2


@torch.no_grad()
def test_equal_inputs_give_equal_bits() -> None:
    layer, x = linear(), torch.randn(1, 1, 512)
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
@torch.no_grad()
def test_more_than_weights_goes_through_the_module(change: object, quick: list[int]) -> None:
    layer = linear()
    change(layer)
    x = torch.randn(1, 1, 512, dtype=next(layer.parameters()).dtype)
    assert torch.equal(project(layer, x), layer(x))
    assert not quick


def test_recorded_gradients_go_through_the_module(quick: list[int]) -> None:
    layer = linear()
    project(layer, torch.randn(1, 1, 512)).sum().backward()
    assert layer.weight.grad is not None
    assert not quick


@torch.no_grad()
def test_many_rows_and_small_weights_go_through_the_module(quick: list[int]) -> None:
    project(linear(), torch.randn(1, 5, 512))
    project(nn.Linear(64, 64), torch.randn(1, 1, 64))
    assert not quick
