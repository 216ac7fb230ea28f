"""Models, numbers and tensors that a stateless decode step refuses, with an error that names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engines.stepping import decoder, t5, token_ids
from transformer.engines import decode_step, encode_step
from transformer.errors import ArgumentError, ConfigurationError, DtypeError, ShapeError
from transformer.models import DecoderOnlyTransformer, EncoderTransformer


def windows() -> DecoderOnlyTransformer:
    return decoder(attention="gqa", num_kv_heads=2, window_size=5, layer_pattern="sliding full")


class Wrapped(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        return self.block(x, **given)


class OwnModel(DecoderOnlyTransformer): ...


def changed(change: Callable[[Any], object]) -> nn.Module:
    model = windows()
    change(model)
    return model


def wrap(model: Any) -> None:
    model.decoder.blocks[1] = Wrapped(model.decoder.blocks[1])


def without_reader() -> nn.Module:
    model: Any = t5()
    model.decoder.blocks[0].cross_attention = None
    return model


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "no model": (lambda: nn.Linear(2, 2), "model: expected a DecoderOnlyTransformer"),
    "encoder": (lambda: EncoderTransformer(61, 32, 4, 48, 1).eval(), "model: expected a DecoderOnlyTransformer"),
    "no head": (lambda: decoder(has_head=False), "model: expected a model with a head"),
    "train": (lambda: changed(nn.Module.train), r"model: expected eval\(\) mode"),
    "wrapped block": (lambda: changed(wrap), r"decoder\.blocks\.1: expected a DecoderBlock"),
    "hook": (
        lambda: changed(lambda m: m.decoder.blocks[2].attention.register_forward_hook(print)),
        r"decoder\.blocks\.2\.attention: expected a module without hooks .*; remove them first",
    ),
    "hook of the model": (
        lambda: changed(lambda m: m.register_forward_hook(print)),
        "model: expected a module without hooks",
    ),
    "forward of the stack's own": (
        lambda: changed(lambda m: setattr(m.decoder, "forward", m.decoder.forward)),
        "decoder: expected a module without hooks and with the forward of its class",
    ),
    "subclass": (lambda: OwnModel(61, 32, 4, 48, 1).eval(), "model: expected a DecoderOnlyTransformer.* got OwnModel"),
    "not causal": (
        lambda: changed(lambda m: setattr(m.decoder.blocks[0].attention, "apply_causal_mask", False)),
        r"decoder\.blocks\.0\.attention: expected apply_causal_mask=True",
    ),
    "wrapped attention": (
        lambda: changed(lambda m: setattr(m.decoder.blocks[0], "attention", nn.Sequential(m.decoder.blocks[0]))),
        r"decoder\.blocks\.0\.attention: expected an attention module",
    ),
    "source": (
        lambda: changed(lambda m: setattr(m.decoder.blocks[2], "cross_attention", m.decoder.blocks[2].attention)),
        r"decoder\.blocks\.2\.cross_attention: expected None, got a module; compose",
    ),
    "no source": (without_reader, r"decoder\.blocks\.0\.cross_attention: expected a module, as .* got None; compose"),
    "positions": (lambda: decoder(position="learned", max_length=8), "max_length: expected at most 8"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_refused(name: str) -> None:
    make, message = MODELS[name]
    with pytest.raises(ConfigurationError, match=message):
        decode_step(make(), 9)


def test_numbers_that_are_refused() -> None:
    model = windows()
    for length in (0, True, 2.0, None):
        with pytest.raises(ConfigurationError, match="max_length"):
            decode_step(model, length)
    with pytest.raises(ConfigurationError, match="length"):
        decode_step(model, 8).empty_buffers(2, 9)
    with pytest.raises(ConfigurationError, match="which has no source"):
        encode_step(model)


def test_tensors_that_are_refused() -> None:
    step = decode_step(windows(), 8)
    ids, at, (keys, values) = torch.ones(2, 1).long(), torch.zeros(2).long(), step.empty_buffers(2)
    shorter = tuple(each[:, :, :5] for each in keys)
    longer = tuple(each.repeat(1, 1, 2, 1) for each in keys)
    for given, message in (
        ((ids[0], at, keys, values), "ids: expected"),
        ((ids[:, :0], at, keys, values), "ids: expected a token of each row or more"),
        ((ids, at, None, None), "keys: expected a tensor for each of 3 layers, got 0"),
        ((ids, at[:1], keys, values), r"positions: expected \[2\]"),
        ((ids, at, keys[:2], values), "keys: expected a tensor for each of 3 layers, got 2"),
        ((ids, at, keys, shorter), r"values: expected \[2, 2, 8, 8\] in layer 0"),
        ((ids, at, longer, longer), "keys: expected at most max_length=8"),
        ((ids[:1], at[:1], keys, values), r"keys: expected \[1, 2, 8, 8\]"),
    ):
        with pytest.raises(ShapeError, match=message):
            step(*given)
    for given, message in (
        ((ids.float(), at, keys, values), "ids: expected int64"),
        ((ids, at.double(), keys, values), "positions: expected int64"),
        ((ids, at, tuple(each.double() for each in keys), values), r"keys, values: expected torch\.float32"),
    ):
        with pytest.raises(DtypeError, match=message):
            step(*given)
    for given, message in (
        ([[1], [1]], "ids: expected a tensor int64"),
        (ids + 60, "ids: expected token ids from 0 to 60"),
    ):
        with pytest.raises(ArgumentError, match=message):
            step(given, at, keys, values)
    with pytest.raises(ArgumentError, match="source_keys, source_values, source_mask: expected None"):
        step(ids, at, keys, values, keys, values, ids)
    with pytest.raises(ArgumentError, match=r"expected eval\(\) mode"):
        step.train()(ids, at, keys, values)


def test_sources_that_are_refused() -> None:
    model = t5()
    step, mask = decode_step(model, 8), torch.ones(2, 5).bool()
    given = torch.ones(2, 1).long(), torch.zeros(2).long(), *step.empty_buffers(2)
    keys, values = encode_step(model)(token_ids(2, 5), mask)
    with pytest.raises(ArgumentError, match="expected all three, from encode_step"):
        step(*given, keys, values)
    with pytest.raises(ShapeError, match=r"source_values: expected \[2, 4, 5, 8\] in layer 0"):
        step(*given, keys, tuple(each[:, :, :4] for each in values), mask)
    with pytest.raises(ArgumentError, match=r"expected eval\(\) mode"):
        encode_step(model).train()(token_ids(2, 5), mask)
