"""Refusals of absolute positions, by name and before anything changes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.conversations import cache_snapshot
from tests.positions.absolutes import MODULES, WIDTH, attention, learned, step_of
from tests.setups import padding, tokens
from transformer.errors import ArgumentError, ConfigurationError, DeviceError, DtypeError, ShapeError
from transformer.positions import AbsolutePositions, LearnedPositions, SinusoidalPositions


@pytest.mark.parametrize("spans", [None, [(0, 1), (0, 2)]])
def test_too_long_is_refused_and_changes_nothing(spans: list[tuple[int, int]] | None) -> None:
    """8 positions: 7 tokens, then 2 are refused, then 1 is accepted."""
    module, layer = learned(max_length=8), attention()
    x = tokens(2, 7, WIDTH)
    with torch.no_grad():
        layer(module(x, layer.plan(x)), step=layer.plan(x))
        before = cache_snapshot(layer)
        mask = None if spans is None else padding(spans, 2)
        step = layer.plan(x[:, :2], attention_mask=mask)
        with pytest.raises(ArgumentError, match=r"^max_length: expected rows of at most 8 tokens, got 7 .* 9 after"):
            module(x[:, :2], step)
        assert cache_snapshot(layer) == before
        last = layer.plan(x[:, :1])
        added = module(x[:, :1], last) - x[:, :1]
    torch.testing.assert_close(added[1, 0], module.embedding.weight[7], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(
    ("error", "given"),
    [
        (ShapeError, torch.zeros(2, WIDTH)),
        (ShapeError, torch.zeros(2, 3, WIDTH, 1)),
        (ShapeError, torch.zeros(2, 3, WIDTH + 1)),
        (ShapeError, torch.zeros(1, 3, WIDTH)),
        (ShapeError, torch.zeros(2, 4, WIDTH)),
        (ShapeError, torch.zeros(2, 1, WIDTH)),
        (DtypeError, torch.zeros(2, 3, WIDTH, dtype=torch.int64)),
        (DtypeError, torch.zeros(2, 3, WIDTH, dtype=torch.bool)),
        (DeviceError, torch.zeros(2, 3, WIDTH, device="meta")),
    ],
)
def test_wrong_input_is_refused(kind: str, error: type[Exception], given: Tensor) -> None:
    with pytest.raises(error, match=r"^x: expected .*, got "):
        MODULES[kind]().float()(given, step_of((0,), torch.zeros(2, 3, WIDTH)))


def test_learned_refuses_what_its_weights_are_not() -> None:
    x = tokens(1, 2, WIDTH, dtype=torch.float32)
    with pytest.raises(DtypeError, match=r"^x: expected torch\.float64, as the module's weights, got torch\.float32"):
        learned()(x, step_of((0,), x))
    with pytest.raises(DeviceError, match=r"^x: expected a tensor on meta, as the module's weights, got cpu"):
        learned().float().to("meta")(x, step_of((0,), x))


NOT_COUNTS = (0, -1, 2.0, "4", True, None)


@pytest.mark.parametrize(
    ("name", "build"),
    [
        *(("max_length", lambda value=value: LearnedPositions(value, 4)) for value in NOT_COUNTS),
        *(("embed_dim", lambda value=value: LearnedPositions(4, value)) for value in NOT_COUNTS),
        *(("offset", lambda value=value: LearnedPositions(4, 4, value)) for value in NOT_COUNTS[1:]),
        *(("embed_dim", lambda value=value: SinusoidalPositions(value)) for value in NOT_COUNTS),
        ("interleaved", lambda: SinusoidalPositions(4, interleaved=1)),
        *(
            ("base", lambda value=value: SinusoidalPositions(4, value))
            for value in (0.0, -1.0, math.nan, math.inf, "9")
        ),
    ],
)
def test_refused(name: str, build: Callable[[], AbsolutePositions]) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name}: expected .*, got "):
        build()
