"""Steps as an argument: planned once, and given to all layers of one kind."""

import pytest
import torch
from torch import nn

from transformer import GroupQueryAttention
from transformer.errors import ArgumentError, CacheStateError, ShapeError
from transformer.positions import RotaryEmbedding

MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


def layers(count: int = 3, **options: object) -> nn.ModuleList:
    torch.manual_seed(2)
    rotary = RotaryEmbedding(4)
    return nn.ModuleList(GroupQueryAttention(16, 4, 2, True, True, position=rotary, **options) for _ in range(count))


@pytest.mark.parametrize("options", [{}, {"window_size": 3}, {"window_size": 2, "num_sinks": 1}])
@pytest.mark.parametrize("mask", [None, MASK])
@torch.no_grad()
def test_a_shared_step_changes_nothing(options: dict, mask: torch.Tensor | None) -> None:
    alone, shared = layers(**options), layers(**options)
    for _ in range(3):
        x = torch.randn(2, 5, 16)
        expected, out = x, x
        step = shared[0].plan(x, attention_mask=mask)
        for one, other in zip(alone, shared, strict=True):
            expected = expected + one(expected, attention_mask=mask)
            out = out + other(out, step=step)
        assert torch.equal(out, expected)


@torch.no_grad()
def test_angles_are_worked_out_once_for_all_layers() -> None:
    stack, x = layers(), torch.randn(2, 5, 16)
    tables = []
    original = stack[0].position.table
    stack[0].position.table = lambda *arguments: tables.append(1) or original(*arguments)
    step = stack[0].plan(x)
    for layer in stack:
        layer(x, step=step)
    assert len(tables) == 1


@torch.no_grad()
def test_a_step_that_does_not_fit_is_refused_and_nothing_changes() -> None:
    (layer,), x = layers(1), torch.randn(2, 5, 16)
    layer(x)
    step = layer.plan(x)
    refused = [
        (ShapeError, "step: made for", {"x": x[:, :4], "step": step}),
        (ArgumentError, "step: expected no expanding_context", {"x": x, "step": step, "expanding_context": True}),
        (ArgumentError, "step: expected no expanding_context", {"x": x, "step": step, "attention_mask": MASK}),
        (ArgumentError, "step: made for Rule", {"x": x, "step": layers(1, window_size=2, num_sinks=1)[0].plan(x)}),
        (CacheStateError, "step: made for row lengths", {"x": x, "step": layers(1)[0].plan(x)}),
    ]
    before = layer.kv_cache["key"].clone()
    for error, message, arguments in refused:
        with pytest.raises(error, match=message):
            layer(**arguments)
    assert torch.equal(layer.kv_cache["key"], before)
    layer(x, step=step)
    with pytest.raises(CacheStateError, match="step: made for row lengths"):
        layer(x, step=step)  # the layer has moved on


@torch.no_grad()
def test_a_step_of_a_cached_layer_is_refused_by_one_without() -> None:
    first, second = layers(2)
    x = torch.randn(2, 5, 16)
    first(x)
    second.use_kv_cache = False
    with pytest.raises(CacheStateError, match="use_kv_cache=False"):
        second(x, step=first.plan(x))


def test_cross_attention_takes_no_step() -> None:
    layer = GroupQueryAttention(16, 4, 2)
    x = torch.randn(2, 5, 16)
    with pytest.raises(ArgumentError, match="step: expected None with kv"):
        layer(x, kv=x, step=layer.plan(x))
