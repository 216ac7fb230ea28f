"""Rotary scalings, compared with plain Python formulas and with transformers."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding

from tests.conversations import run_chunks
from tests.positions.scalings import CASES, Case
from transformer import GroupQueryAttention
from transformer.positions import DynamicNTKScaling, LinearScaling, RotaryEmbedding, YaRNScaling

FAR = [0, 1, 100, 8191, 131_071, 3_999_999, 4_000_000]


every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def config_of(case: Case, base: float, head_dim: int, dim: int) -> LlamaConfig:
    """A transformers config whose own length at the start is the original one, as it is for its dynamic rule."""
    parameters = {"rope_theta": base, "partial_rotary_factor": dim / head_dim, **case.theirs(dim)}
    return LlamaConfig(
        hidden_size=2 * head_dim,
        head_dim=head_dim,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=case.original,
        rope_parameters=parameters,
        attn_implementation="eager",
    )


@every_case
@pytest.mark.parametrize("base", [100.0, 10000.0, 5e5])
@pytest.mark.parametrize(("head_dim", "dim"), [(64, 64), (16, 4), (10, 6)])
def test_frequencies(case: Case, base: float, head_dim: int, dim: int) -> None:
    scaling = case.ours(dim)
    frequencies = scaling.frequencies(base, dim)
    assert frequencies.dtype == torch.float64
    plain = torch.tensor([case.plain(i, base, dim) for i in range(dim // 2)], dtype=torch.float64)
    torch.testing.assert_close(frequencies, plain, rtol=1e-13, atol=0)
    assert scaling.attention_factor == pytest.approx(case.attention, rel=1e-14)

    config = config_of(case, base, head_dim, dim)
    kind = config.rope_parameters["rope_type"]
    theirs, attention = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=case.length)
    torch.testing.assert_close(frequencies, theirs.double(), rtol=3e-6, atol=0)
    assert scaling.attention_factor == pytest.approx(attention, rel=1e-12)


@every_case
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_whole_table_holds_far_out(case: Case, interleaved: bool, dtype: torch.dtype) -> None:
    """To 1e-6 at position 4,000,000, in part of a head, after a cast, and also from blocks."""
    base, dim = 10000.0, 8
    rotary = RotaryEmbedding(12, base, rotary_dim=dim, interleaved=interleaved, scaling=case.ours(dim)).to(
        torch.bfloat16
    )
    like = torch.zeros(1, dtype=dtype)
    table = rotary.table(torch.tensor([FAR]), like)
    assert table.cos.dtype == dtype
    for row, position in enumerate(FAR):
        in_block = rotary.table(range(position, position + 1), like)
        for i in range(dim // 2):
            angle = position * case.plain(i, base, dim)
            cos, sin = case.attention * math.cos(angle), case.attention * math.sin(angle)
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
            for given in (table.cos[0, 0, row], in_block.cos[0]):
                assert [given[a].item(), given[b].item()] == pytest.approx([cos, cos], abs=1e-6)
            for given in (table.sin[0, 0, row], in_block.sin[0]):
                assert [given[a].item(), given[b].item()] == pytest.approx([-sin, sin], abs=1e-6)


@every_case
@pytest.mark.parametrize(("head_dim", "dim"), [(16, 16), (16, 4)])
def test_cosines_and_sines_of_transformers(case: Case, head_dim: int, dim: int) -> None:
    """Its module at the length of the case: attention scaling is in its cosines and sines as in ours."""
    rotary = LlamaRotaryEmbedding(config_of(case, 10000.0, head_dim, dim))
    positions = torch.tensor([[0, 1, 3, min(case.length, 500) - 1, case.length - 1]])
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions)
    ours = RotaryEmbedding(head_dim, rotary_dim=dim, scaling=case.ours(dim)).table(positions)
    # Their angles are formed in float32, off by half a step of the largest one.
    atol = 1e-6 + 2e-7 * case.length
    torch.testing.assert_close(ours.cos[0], cos, rtol=0, atol=atol)
    half = dim // 2
    torch.testing.assert_close(ours.sin[0, ..., half:], sin[..., half:], rtol=0, atol=atol)
    torch.testing.assert_close(ours.sin[0, ..., :half], -sin[..., :half], rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["linear 2.5", "dynamic far", "llama3 other", "yarn short", "yarn mscale"])
def test_attention_of_transformers(name: str) -> None:
    case, head_dim, length = CASES[name], 16, 60
    config = config_of(case, 10000.0, head_dim, head_dim)
    theirs, rotary = LlamaAttention(config, 0).eval(), LlamaRotaryEmbedding(config)
    scaled = RotaryEmbedding(head_dim, scaling=case.ours(head_dim))
    ours = GroupQueryAttention(32, 2, 2, True, True, head_dim=head_dim, bias=False, position=scaled)
    ours.load_state_dict({name.replace("o_proj", "out_proj"): weight for name, weight in theirs.state_dict().items()})
    x = torch.randn(2, length, 32) * 3
    causal = torch.full((length, length), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        rotary(x, torch.tensor([[case.length - 1]]))  # the length of the case, which its dynamic rule then keeps
        angles = rotary(x, torch.arange(length)[None])
        expected = theirs(x, position_embeddings=angles, attention_mask=causal)[0]
        torch.testing.assert_close(run_chunks(ours, x, (11, 1, 1, 47)), expected, rtol=0, atol=1e-5)


@every_case
@pytest.mark.parametrize(
    "changed",
    [
        lambda rotary: rotary.to(torch.bfloat16),
        lambda rotary: rotary.half(),
        copy.deepcopy,
        lambda rotary: pickle.loads(pickle.dumps(rotary)),
    ],
    ids=["bfloat16", "half", "deepcopy", "pickle"],
)
def test_a_changed_module_turns_the_same(case: Case, changed: Callable[[RotaryEmbedding], RotaryEmbedding]) -> None:
    rotary = RotaryEmbedding(8, scaling=case.ours(8))
    like, positions = torch.zeros(1, dtype=torch.float64), torch.tensor([FAR])
    before: list[Tensor] = [*rotary.table(positions, like), *rotary.table(range(5), like)]
    again = changed(rotary)
    assert again.scaling == rotary.scaling
    assert hash(again.scaling) == hash(rotary.scaling)
    after = [*again.table(positions, like), *again.table(range(5), like)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not rotary.state_dict()
    assert repr(rotary.scaling) in repr(again)
    with pytest.raises(FrozenInstanceError):
        rotary.scaling.factor = 2.0


def test_without_a_scaling() -> None:
    """Nothing changes, to the last bit, for a scaling that does nothing either."""
    plain = RotaryEmbedding(8)
    assert repr(plain) == "RotaryEmbedding(head_dim=8, base=10000.0, rotary_dim=8, interleaved=False)"
    for scaling in (LinearScaling(1.0), DynamicNTKScaling(4.0, 64, 64), DynamicNTKScaling(1.7, 64, 1)):
        scaled = RotaryEmbedding(8, scaling=scaling)
        for positions in (range(5), torch.tensor([FAR])):
            pairs = zip(plain.table(positions), scaled.table(positions), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_a_module_built_in_inference_mode_learns() -> None:
    with torch.inference_mode():
        rotary = RotaryEmbedding(4, scaling=YaRNScaling(4.0, 4096))
        rotary.table(range(3))
    x = torch.ones(1, 1, 3, 4, requires_grad=True)
    rotary.rotate(x, rotary.table(range(3), x)).sum().backward()
    assert x.grad.isfinite().all()
