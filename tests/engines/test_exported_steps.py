"""Exported decode steps: `torch.export` and ONNX, with a batch and buffers of any size, write our own greedy tokens."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export, load, save

from tests.engines.stepping import (
    TOKENS,
    OnnxModule,
    Run,
    decoder,
    encoder_decoder,
    greedy,
    prompts,
    token_ids,
    umt5,
)
from transformer.engines import DecodeStep, decode_step, encode_step

pytestmark = [
    pytest.mark.slow,
    # The exporter itself uses what other parts of PyTorch and of onnxscript call old.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

GQA = {"attention": "gqa", "num_kv_heads": 2}
SIZES = (((3, 7, 5), 64), ((4,), 50))
"""Lengths of prompts, and slots of the buffers: other ones than those of the example."""


def inputs(step: DecodeStep, *source: Any) -> tuple[Any, ...]:
    """Inputs of the example: two rows, and a source of two."""
    return torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), *step.empty_buffers(2), *source


def own_tokens(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    return model.generate(ids, mask, max_new_tokens=TOKENS, stop_tokens=())[:, -TOKENS:]


def check_tokens(run: Run, model: nn.Module, step: DecodeStep) -> None:
    for lengths, slots in SIZES:
        rows, ids, mask = prompts(lengths)
        assert torch.equal(greedy(run, step, rows, slots), own_tokens(model, ids, mask))


def test_a_program(tmp_path: Path) -> None:
    """As exported, saved and loaded, and in onnxruntime."""
    model = decoder(**GQA, window_size=5, num_sinks=1, layer_pattern="sliding full", num_layers=2)
    step, file = decode_step(model, 64), io.BytesIO()
    program = export(step, inputs(step), dynamic_shapes=step.dynamic_shapes())
    check_tokens(program.module(), model, step)
    save(program, file)
    file.seek(0)
    check_tokens(load(file).module(), model, step)
    check_tokens(OnnxModule(program, tmp_path / "step.onnx"), model, step)


def test_a_program_that_reads_chunks() -> None:
    """Exported strictly."""
    model = decoder(position="alibi", softcap=5.0, num_layers=1)
    step, ids = decode_step(model, 64), token_ids(3, 20)
    shapes = ({**step.dynamic_shapes()[0], 1: Dim("tokens", max=64)}, *step.dynamic_shapes()[1:])
    given = torch.zeros(2, 3, dtype=torch.int64), *inputs(step)[1:]
    read = export(step, given, dynamic_shapes=shapes, strict=True).module()
    with torch.no_grad():
        first, keys, values = read(ids[:, :12], torch.zeros(3, dtype=torch.int64), *step.empty_buffers(3, 21))
        second, _, _ = read(ids[:, 12:], torch.full((3,), 12), keys, values)
        torch.testing.assert_close(torch.cat((first, second), 1), model(ids), atol=1e-5, rtol=0)


def test_learned_positions(tmp_path: Path) -> None:
    model = decoder(position="learned", max_length=64, norm="layer", num_layers=1)
    step = decode_step(model, 64)
    program = export(step, inputs(step), dynamic_shapes=step.dynamic_shapes())
    check_tokens(OnnxModule(program, tmp_path / "step.onnx"), model, step)


@pytest.mark.parametrize("name", ["by options", "umt5"])
def test_an_encoder_decoder(name: str, tmp_path: Path) -> None:
    model = umt5(num_layers=1) if name == "umt5" else encoder_decoder(**GQA, qk_norm=True, num_layers=1)
    step, encode = decode_step(model, 64), encode_step(model)
    ids, mask = token_ids(2, 6), torch.ones(2, 6, dtype=torch.bool)
    shapes = step.dynamic_shapes()
    encoding = export(encode, (ids, mask), dynamic_shapes=(shapes[6], shapes[6]))
    program = export(step, inputs(step, *encoding.module()(ids, mask), mask), dynamic_shapes=shapes)
    # Once is enough: each conversion takes seconds.
    read = OnnxModule(encoding, tmp_path / "encode.onnx") if name == "umt5" else encoding.module()
    run = OnnxModule(program, tmp_path / "step.onnx")
    for lengths, slots in SIZES:
        source, mask = token_ids(len(lengths), 9), torch.arange(9) < torch.tensor(lengths).unsqueeze(-1)
        with torch.no_grad():
            projected = read(source, mask)
        tokens = greedy(run, step, [[0]] * len(lengths), slots, *projected, mask)
        assert torch.equal(tokens, own_tokens(model, source, mask))
