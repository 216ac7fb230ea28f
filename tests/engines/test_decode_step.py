"""Stateless decode step: equal to the model without caches, and to its own generation with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from tests.engines.stepping import (
    TOKENS,
    by_parts,
    decoder,
    encoder_decoder,
    greedy,
    prompts,
    t5,
    token_ids,
    umt5,
    with_rules,
)
from tests.integration.builders import SCALINGS
from transformer.engines import DecodeStep, decode_step, encode_step

GQA = {"attention": "gqa", "num_kv_heads": 2}
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "windows": lambda: decoder(**GQA, window_size=5, layer_pattern="sliding full", qk_norm=True),
    "sinks": lambda: decoder(attention="mqa", window_size=4, num_sinks=2),
    "alibi with sinks": lambda: decoder(position="alibi", window_size=4, num_sinks=1, softcap=5.0),
    "relative": lambda: decoder(position="relative", logit_softcap=9.0, window_size=3, num_sinks=3),
    "learned": lambda: decoder(position="learned", max_length=64, norm="layer", tied_embeddings=True),
    "sinusoidal": lambda: decoder(position="sinusoidal", norm_placement="after", attention_bias=True),
    "none": lambda: decoder(position="none", scale=0.2, norm_placement="both"),
    "norms of all heads and of branches": lambda: decoder(
        **GQA, qk_norm=True, qk_norm_per_head=False, norm_placement="branch", residual_scale=0.4
    ),
    "bases and layers without positions": lambda: decoder(
        window_size=5, layer_pattern="sliding full", rotary_sliding_base=9.0, position_pattern="rotary none"
    ),
    "parallel": lambda: decoder(residual="parallel"),
    "parallel, one norm": lambda: decoder(residual="parallel_one_norm", **GQA),
    "by parts": by_parts,
    "rules": with_rules,
    "logits of sinks": lambda: decoder(**GQA, window_size=4, num_sinks=2, sink_logits=True),
    **{f"rotary {name}": lambda each=each: decoder(rotary_scaling=each) for name, each in SCALINGS.items()},
}
ENCODER_DECODERS: dict[str, Callable[[], nn.Module]] = {
    "by options": lambda: encoder_decoder(**GQA, window_size=4, qk_norm=True),
    "learned": lambda: encoder_decoder(position="learned", max_length=64, norm_placement="after"),
    "t5": t5,
    "umt5": umt5,
}
LENGTH = 24


def unread(step: DecodeStep, batch: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Buffers of NaN."""
    keys, values = step.empty_buffers(batch)
    return tuple(each * torch.nan for each in keys), tuple(each * torch.nan for each in values)


def run_steps(step: DecodeStep, ids: Tensor, *source: Any) -> Tensor:
    """Logits [B, L, V]; the row `r` begins `r` steps later."""
    (batch, length), (keys, values) = ids.shape, unread(step, ids.shape[0])
    row, logits = torch.arange(batch), []
    for time in range(length + batch - 1):
        positions = (time - row).clamp(0, length - 1)
        out, keys, values = step(ids[row, positions].unsqueeze(-1), positions, keys, values, *source)
        logits.append(out)
    every = torch.cat(logits, 1)
    return torch.stack([every[index, index : index + length] for index in range(batch)])


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", DECODERS)
def test_steps_are_the_forward(name: str) -> None:
    """Rows at different positions, unused slots of NaN, against the uncached forward in float64."""
    model, ids = DECODERS[name](), token_ids(3, 20)
    steps = run_steps(decode_step(model, LENGTH), ids)
    assert_close(steps.double(), model.double()(ids), atol=1e-5, rtol=0)
    assert_close(run_steps(decode_step(model, LENGTH), ids), model(ids), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_steps_over_a_source(name: str) -> None:
    model, ids, source = ENCODER_DECODERS[name](), token_ids(3, 20), token_ids(3, 9, seed=1)
    mask = torch.arange(9) < torch.tensor([[9], [4], [7]])
    projected = encode_step(model)(source, mask)
    steps = run_steps(decode_step(model, LENGTH), ids, *projected, mask)
    assert_close(steps, model(source, ids, mask), atol=1e-5, rtol=0)


def test_vectors_as_a_source() -> None:
    model = encoder_decoder(src_vocab_size=None)
    ids, source, mask = token_ids(2, 6), torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.int64)
    steps = run_steps(decode_step(model, LENGTH), ids, *encode_step(model)(source, mask), mask)
    assert_close(steps, model(source, ids, mask), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["windows", "alibi with sinks", "learned", "by parts"])
def test_a_loop_is_generate(name: str) -> None:
    model = DECODERS[name]()
    rows, ids, mask = prompts((3, 7, 5))
    step = decode_step(model, 64)
    tokens = greedy(step, step, rows, 7 + TOKENS)
    assert len(tokens.unique()) > 9
    # With caches a model would refuse a block that is there twice.
    own = model.generate(ids, mask, max_new_tokens=TOKENS, use_cache=name != "by parts")
    assert torch.equal(tokens, own[:, 7:])


@pytest.mark.parametrize("name", ["windows", "sinks", "relative"])
def test_a_chunk_is_its_steps(name: str) -> None:
    """Padding at the end of a row's chunk is replaced by what follows."""
    model, ids = DECODERS[name](), token_ids(3, 20)
    step = decode_step(model, LENGTH)
    read = torch.tensor([9, 4, 6])
    first, keys, values = step(ids[:, :9], torch.zeros(3, dtype=torch.int64), *unread(step, 3))
    rest = torch.stack([ids[row, at : at + 8] for row, at in enumerate(read.tolist())])
    second, _, _ = step(rest, read, keys, values)
    expected = model(ids)
    for row, at in enumerate(read.tolist()):
        assert_close(torch.cat((first[row, :at], second[row]))[: at + 8], expected[row, : at + 8], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, ids = DECODERS["windows"](), token_ids(3, 20)
    expected = model(ids)
    model = model.to(dtype)
    steps, forward = run_steps(decode_step(model, LENGTH), ids), model(ids)
    assert steps.dtype is dtype
    assert (steps - expected).abs().max() <= 2 * (forward - expected).abs().max()


def test_a_function_of_its_tensors() -> None:
    """Inputs and the model's own caches stay as they are, and the parameters are the model's."""
    model, ids = DECODERS["windows"](), token_ids(2, 6)
    model.enable_cache()
    expected = model(ids)
    step = decode_step(model, LENGTH)
    assert {id(each) for each in step.parameters()} == {id(each) for each in model.parameters()}
    keys, values = step.empty_buffers(2)
    given = (ids[:, :1], torch.zeros(2, dtype=torch.int64), keys, values)
    first, after, _ = step(*given)
    assert not any(each.any() for each in (*keys, *values))
    assert all(each.any() for each in after)
    assert torch.equal(step(*given)[0], first)
    assert_close(first, expected[:, :1], atol=1e-5, rtol=0)
    assert model.kv_cache.length == 6


class Adapter(nn.Module):
    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.projection = projection
        self.added = nn.Linear(projection.in_features, projection.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x) + self.added(x)


def test_adapters_of_projections() -> None:
    model, ids = DECODERS["windows"](), token_ids(2, 9)
    for block in model.decoder.blocks:
        block.attention.k_proj = Adapter(block.attention.k_proj)
    assert_close(run_steps(decode_step(model, LENGTH), ids), model(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["sinks", "alibi with sinks", "learned", "by parts"])
def test_nothing_is_asked_of_the_host(name: str) -> None:
    step = decode_step(DECODERS[name](), LENGTH)
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits, _, _ = step(torch.zeros(2, 1).long(), torch.zeros(2).long(), *step.empty_buffers(2))
    assert logits.shape == (2, 1, 61)


@pytest.mark.parametrize("position", [-1, 8])
def test_a_position_outside_of_the_buffers(position: int) -> None:
    step = decode_step(DECODERS["windows"](), 8)
    with pytest.raises(RuntimeError, match="out of bounds"):
        step(torch.ones(1, 1).long(), torch.tensor([position]), *step.empty_buffers(1))
