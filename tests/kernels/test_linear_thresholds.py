"""Thresholds of projections and norms: just below, at and just above each, against `F.linear` and plain norms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.internals import sliced_products, without_compiled_kernels
from transformer.kernels import layer_norm, private_operators, project, rms_norm, tuned, tuning
from transformer.kernels.tuning import DEFAULT


@pytest.fixture(autouse=True)
def _without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiled_kernels(monkeypatch)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which quick ways were taken."""
    ran, onednn_linear = [], private_operators.onednn_linear
    sliced_products(monkeypatch, lambda: ran.append("slices"))
    monkeypatch.setattr(
        private_operators, "onednn_linear", lambda *given: ran.append("oneDNN") or onednn_linear(*given)
    )
    return ran


def check(layer: nn.Linear, rows: int) -> None:
    x = torch.randn(1, rows, layer.in_features)
    torch.testing.assert_close(project(layer, x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("more", "quick"), [(-1, False), (0, True), (1, True)])
@pytest.mark.parametrize(("rows", "way"), [(1, "slices"), (9, "oneDNN")])
@torch.no_grad()
def test_min_linear_weights(more: int, quick: bool, rows: int, way: str, taken: list[str]) -> None:
    """The outputs differ by eight, so that the slices divide them."""
    layer = nn.Linear(DEFAULT.min_linear_weights // 512, 512 + 8 * more)
    assert layer.weight.numel() - DEFAULT.min_linear_weights == 8 * more * layer.in_features
    with tuned(max_sliced_numbers=8 * layer.in_features):
        check(layer, rows)
    assert taken == [way] * quick


@pytest.mark.parametrize(("more", "quick"), [(-1, False), (0, True), (1, True)])
@torch.no_grad()
def test_min_linear_weights_to_the_weight(more: int, quick: bool, taken: list[str]) -> None:
    with tuned(min_linear_weights=64 * 64 - more):
        check(nn.Linear(64, 64), 1)
    assert taken == ["slices"] * quick


@pytest.mark.parametrize("more", [-1, 0, 1])
@torch.no_grad()
def test_min_compiled_linear_weights_is_for_compiled_calls_alone(more: int, taken: list[str]) -> None:
    """An eager call of so few weights is the linear itself, on both sides."""
    assert DEFAULT.min_compiled_linear_weights < DEFAULT.min_linear_weights
    layer = nn.Linear(DEFAULT.min_compiled_linear_weights // 256, 256 + 8 * more)
    x = torch.randn(1, 1, layer.in_features)
    assert torch.equal(project(layer, x), layer(x))
    with tuned(min_compiled_linear_weights=layer.weight.numel() - more):
        assert torch.equal(project(layer, x), layer(x))
    assert not taken


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_linear_slices(more: int, bias: bool, rows: int, taken: list[str]) -> None:
    """Outputs that the slices do not divide are not sliced."""
    slices = DEFAULT.linear_slices
    for outputs in (512, 512 + more, 508):
        with tuned(min_linear_weights=1):
            check(nn.Linear(256, outputs, bias), rows)
    with tuned(min_linear_weights=1, linear_slices=slices + more):
        check(nn.Linear(256, 504, bias), rows)
    whole = [512 % slices, (512 + more) % slices, 508 % slices, 504 % (slices + more)]
    assert taken == ["oneDNN" if rest else "slices" for rest in whole]


@pytest.mark.parametrize(("more", "way"), [(-1, "slices"), (0, "slices"), (1, "oneDNN")])
@torch.no_grad()
def test_max_sliced_numbers(more: int, way: str, taken: list[str]) -> None:
    """Three rows of as many numbers as fit, of one number less, and of one more."""
    layer = nn.Linear(DEFAULT.max_sliced_numbers // 3 + more, 512)
    with tuned(min_linear_weights=1):
        check(layer, 3)
    assert taken == [way]


@pytest.mark.parametrize(("more", "product"), [(-1, True), (0, True), (1, False)])
@pytest.mark.parametrize("unit_offset", [False, True])
@torch.no_grad()
def test_max_norm_rows(more: int, product: bool, unit_offset: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, baddbmm = [], torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *given, **options: ran.append(1) or baddbmm(*given, **options))
    x, weight, bias = torch.randn(DEFAULT.max_norm_rows + more, 1, 48) * 3, torch.randn(48), torch.randn(48)
    factor = weight.double() + unit_offset
    wide = x.double()
    plain = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * factor
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, unit_offset).double(), plain, rtol=0, atol=1e-5)
    assert bool(ran) == product
    centred = wide - wide.mean(-1, keepdim=True)
    plain = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * factor + bias.double()
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-5, unit_offset).double(), plain, rtol=0, atol=1e-5)


def test_every_size_of_a_projection_or_a_norm_has_a_test() -> None:
    """The rest are those of attention, in test_backends.py."""
    sizes = [name for name in vars(DEFAULT) if "linear" in name or "sliced" in name or "norm" in name]
    assert [name for name in sizes if not any(test.startswith(f"test_{name}") for test in globals())] == []
    assert tuning.active is DEFAULT
