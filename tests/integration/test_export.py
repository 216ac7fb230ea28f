"""`torch.export` and ONNX: dynamic batch and length, masks, steps over a frozen layout, and a model left as it was."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram, export, load, save, unflatten
from torch.testing import assert_close

from tests.integration.builders import (
    ATTENTIONS,
    PADDINGS,
    decoder,
    encoder,
    encoder_decoder,
    padding,
    reachable_tensors,
    token_ids,
    vectors,
)
from transformer import AttentionError

pytestmark = pytest.mark.slow

# Batch, length, and a source's length; the least length is one that PyTorch does not treat apart.
B, L, S = Dim("B", min=2, max=64), Dim("L", min=2, max=512), Dim("S", min=2, max=512)


class Case(NamedTuple):
    """A model with the inputs of one size, and the dimensions of each input that may change."""

    model: nn.Module
    inputs: Callable[[int, int], tuple[Tensor, ...]]
    shapes: tuple[dict[int, Dim], ...]

    def call(self, module: Callable, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Outputs of `module` and of the model itself at real tokens; masks come last."""
        inputs = self.inputs(batch, length)
        real = inputs[-1] if len(inputs) > 1 else torch.ones_like(inputs[0], dtype=torch.bool)
        with torch.no_grad():
            return module(*inputs)[real], self.model(*inputs)[real]


def masked(model: nn.Module) -> Case:
    def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
        where = PADDINGS[length % len(PADDINGS)]
        return token_ids(batch, length), padding(where, batch, length)

    return Case(model, inputs, ({0: B, 1: L}, {0: B, 1: L}))


def unmasked(model: nn.Module) -> Case:
    return Case(model, lambda batch, length: (token_ids(batch, length),), ({0: B, 1: L},))


def reading(model: nn.Module) -> Case:
    """An encoder-decoder with both masks."""

    def inputs(batch: int, length: int) -> tuple[Tensor, ...]:
        source, target = token_ids(batch, length + 3), token_ids(batch, length, seed=1)
        return source, target, padding("right", batch, length + 3), padding("left", batch, length)

    return Case(model, inputs, ({0: B, 1: S}, {0: B, 1: L}, {0: B, 1: S}, {0: B, 1: L}))


CASES: dict[str, Callable[[], Case]] = {
    "decoder without masks": lambda: unmasked(decoder()),
    "decoder": lambda: masked(decoder(attention="gqa", num_groups=2, qk_norm=True)),
    "decoder of 512": lambda: masked(decoder(d_model=512, attention="gqa", num_groups=2)),
    "alibi, window and sinks": lambda: masked(decoder(position="alibi", window_size=4, num_sinks=1)),
    "relative, mixed pattern": lambda: masked(
        decoder(position="relative", window_size=4, layer_pattern="sliding full")
    ),
    "learned, soft caps": lambda: masked(decoder(position="learned", max_length=600, softcap=5.0, logit_softcap=9.0)),
    "encoder": lambda: masked(encoder(position="sinusoidal", norm="layer", norm_placement="after")),
    "encoder decoder": lambda: reading(encoder_decoder()),
}
SIZES = ((4, 9), (3, 6), (2, 20), (5, 7), (6, 8))


def exported(case: Case, strict: bool) -> ExportedProgram:
    with torch.no_grad():
        return export(case.model, case.inputs(4, 9), dynamic_shapes=case.shapes, strict=strict)


@pytest.mark.parametrize(
    ("name", "strict"),
    [
        *((name, False) for name in CASES),
        ("decoder", True),
        ("relative, mixed pattern", True),
        ("encoder decoder", True),
    ],
)
def test_batch_and_length_may_change(name: str, strict: bool) -> None:
    case = CASES[name]()
    program = exported(case, strict).module()
    for size in SIZES:
        assert_close(*case.call(program, *size), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["rotary longrope", "window sinks rotary", "relative both ways"])
def test_an_attention_module_alone(kind: str) -> None:
    module, x, real = ATTENTIONS[kind](), vectors(4, 9), padding("both", 4, 9)
    shapes = {"x": {0: B, 1: L}, "attention_mask": {0: B, 1: L}}
    program = export(module, (x,), {"attention_mask": real}, dynamic_shapes=shapes).module()
    for batch, length in SIZES:
        x, real = vectors(batch, length), padding("holes", batch, length)
        out = program(x, attention_mask=real)
        assert_close(out[real], module(x, attention_mask=real)[real], atol=1e-5, rtol=0)
        assert (out[~real] == 0).all()


def test_cross_attention_alone() -> None:
    module = ATTENTIONS["plain"]()

    def inputs(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        return vectors(batch, length), vectors(batch, length + 2, seed=1), padding("right", batch, length + 2)

    x, kv, real = inputs(4, 9)
    shapes = {"x": {0: B, 1: L}, "kv": {0: B, 1: S}, "kv_mask": {0: B, 1: S}}
    program = export(module, (x, kv), {"kv_mask": real}, dynamic_shapes=shapes).module()
    for size in SIZES:
        x, kv, real = inputs(*size)
        assert_close(program(x, kv, kv_mask=real), module(x, kv, kv_mask=real), atol=1e-5, rtol=0)


# `unflatten` uses what other parts of PyTorch call old.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("name", ["decoder", "encoder decoder"])
def test_what_is_done_with_a_program(name: str) -> None:
    """Saved and loaded, decomposed, and made into modules again."""
    case = CASES[name]()
    program, file = exported(case, False), io.BytesIO()
    save(program, file)
    file.seek(0)
    for module in (load(file).module(), program.run_decompositions().module(), unflatten(program)):
        assert_close(*case.call(module, 3, 6), atol=1e-5, rtol=0)


# The exporter itself uses what other parts of PyTorch and of onnxscript call old.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "name", ["decoder of 512", "alibi, window and sinks", "relative, mixed pattern", "encoder decoder"]
)
def test_onnx(name: str, tmp_path: Path) -> None:
    case, path = CASES[name](), tmp_path / "model.onnx"
    torch.onnx.export(
        case.model, case.inputs(4, 9), path, dynamo=True, verbose=False, dynamic_shapes=case.shapes, external_data=False
    )
    session = onnxruntime.InferenceSession(path)
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        given = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    for size in SIZES:
        assert_close(*case.call(run, *size), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "strict"),
    [({}, True), ({"window_size": 4, "num_sinks": 1}, False), ({"position": "alibi"}, False)],
    ids=["full", "window", "alibi"],
)
def test_a_frozen_step_goes_on(options: dict[str, Any], strict: bool) -> None:
    """The exported program has the conversation, which its steps continue; export itself is no step."""
    model, ids = decoder(**options), token_ids(2, 9)
    with torch.no_grad():
        expected = model(ids)
        model.enable_cache(max_length=16)
        model(ids[:, :6])
        model.kv_cache.freeze_layout()
        step = export(model, (ids[:, 6:7],), strict=strict).module()
        assert model.kv_cache.length == 6
        for at in (6, 7, 8):
            assert_close(step(ids[:, at : at + 1]), expected[:, at : at + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("strict", [False, True])
def test_a_live_step_that_is_not_frozen_is_refused(strict: bool) -> None:
    """Without a loss: the conversation continues eagerly."""
    model, ids = decoder(), token_ids(2, 8)
    with torch.no_grad():
        expected = model(ids)
        model.enable_cache()
        model(ids[:, :7])
        with pytest.raises((AttentionError, torch._dynamo.exc.TorchDynamoException), match="freeze_layout"):
            export(model, (ids[:, 7:],), strict=strict)
        assert model.kv_cache.length == 7
        assert_close(model(ids[:, 7:]), expected[:, 7:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "strict"),
    [("decoder", False), ("relative, mixed pattern", True), ("encoder decoder", False)],
)
def test_a_fresh_model_that_was_exported_is_untouched(name: str, strict: bool) -> None:
    """Tables that are made at the first call are not made of a trace's tensors, and are right afterwards."""
    case = CASES[name]()
    tensors = {path: id(tensor) for path, tensor in reachable_tensors(case.model)}
    exported(case, strict)
    after = dict(reachable_tensors(case.model))
    assert not {path for path, tensor in after.items() if isinstance(tensor, FakeTensor) or tensor.is_meta}
    assert {path: id(after[path]) for path in tensors} == tensors
    inputs = case.inputs(3, 7)
    with torch.no_grad():
        assert torch.equal(case.model(*inputs), CASES[name]().model(*inputs))
