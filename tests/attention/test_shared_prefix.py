"""Attention of rows that share a prefix: 16-bit errors, generations, beams, and models of several kinds of layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.attention.test_numerics import OPTIONS, bare, heads
from tests.blocks.stacks import MIXED, WITH_SINKS, make
from tests.conversations import assert_same
from tests.internals import without_compiled_kernels
from tests.oracle_operations import EditableConversation
from tests.setups import SCHEMES, build, padding, tokens
from transformer import DecoderOnlyTransformer, KVCache
from transformer.kernels import tuned

APART = 1 << 40
"""Bytes that no selection here saves."""


@pytest.fixture(params=["compiled", "PyTorch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "PyTorch":
        without_compiled_kernels(monkeypatch)
    with torch.no_grad(), tuned(min_shared_bytes=0):
        yield


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [8, 2, 1])
@pytest.mark.parametrize("own", [1, 20])
def test_sixteen_bit_error(own: int, groups: int, dtype: torch.dtype) -> None:
    """At most twice that of SDPA, although two parts are merged."""
    module = build(replace(OPTIONS, num_groups=groups), dtype=dtype)
    bare(module)
    prompt, new = 2 * tokens(1, 96, 64, dtype=dtype), 2 * tokens(4, own + 3, 64, seed=1, dtype=dtype)
    module(prompt)
    module.kv_cache.select([0] * 4)
    ours = torch.cat([module(part) for part in new.split((own, 1, 2), 1)], 1)
    assert module.kv_cache.nbytes_used == (96 + 4 * (own + 3)) * groups * 2 * 8 * 2
    queries, keys, values = heads(torch.cat((prompt.expand(4, -1, -1), new), 1), groups)
    mask = torch.ones(queries.shape[2], queries.shape[2], dtype=torch.bool).tril()
    exact = scaled_dot_product_attention(*(t.double() for t in (queries, keys, values)), attn_mask=mask)
    theirs = scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    exact, theirs = (t.transpose(1, 2).flatten(2)[:, 96:] for t in (exact, theirs))
    bound = 2 * (theirs.double() - exact).abs().max().item() + 1e-5
    assert (ours.double() - exact).abs().max().item() <= bound


@pytest.mark.parametrize("groups", [8, 2, 1])
def test_float32_error(groups: int) -> None:
    """A part with a small share keeps its digits: 1e-6 of the largest value, where one new token meets thousands."""
    module = build(replace(OPTIONS, num_groups=groups), dtype=torch.float64)
    bare(module)
    prompt, new = 2 * tokens(1, 3000, 64), 2 * tokens(8, 1, 64, seed=1)
    module(prompt)
    module.kv_cache.select([0] * 8)
    exact = module(new)
    module.kv_cache.truncate(3000).to(dtype=torch.float32)
    ours = module.float()(new.float())
    assert module.kv_cache.nbytes_used == (3000 + 8) * groups * 2 * 8 * 4
    assert (ours.double() - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_against_the_oracle(softcap: float | None, groups: int) -> None:
    """Plain loops, of prompts of several lengths whose rows go on apart."""
    options = replace(OPTIONS, embed_dim=16, num_heads=4, head_dim=4, num_groups=groups, softcap=softcap)
    options = replace(options, scheme=SCHEMES["rotary halves"])
    module = build(options)
    oracle = EditableConversation(module, options)

    def say(x: Tensor, mask: Tensor | None = None) -> None:
        assert_same(module(x, attention_mask=mask), oracle.call(x, mask)[0], atol=1e-10)

    say(tokens(2, 7, 16), padding([(0, 7), (2, 4)], 7))
    rows = [1, 0, 0, 1, 1]
    module.kv_cache.select(rows)
    oracle = oracle.selected(rows)
    for number, spans in enumerate(([(0, 3)] * 5, [(0, 1), (1, 2), (0, 0), (0, 3), (2, 1)])):
        say(tokens(5, 3, 16, seed=number + 1), padding(spans, 3))
    say(tokens(5, 1, 16, seed=9))
    assert module.kv_cache.nbytes_used < sum(module.kv_cache.lengths.tolist()) * 2 * groups * 4 * 8


@pytest.mark.parametrize("layers", [MIXED, WITH_SINKS], ids=["mixed", "with sinks"])
def test_a_stack_of_several_kinds_of_layers(layers: tuple) -> None:
    """Layers that share and layers with windows, which do not, in one step; in a transaction of the stack."""
    stacks = []
    for least in (0, APART):
        stack, x = make(layers), tokens(2, 9, 16)
        outs = [stack(x, attention_mask=padding([(0, 9), (3, 5)], 9))]
        with tuned(min_shared_bytes=least):
            KVCache.from_model(stack).select([0, 0, 1, 0])
        for number, length in enumerate((1, 3, 40, 1)):
            outs.append(stack(tokens(4, length, 16, seed=number)))
        mask = padding([(0, row % 2) for row in range(4)], 1)
        outs.append(stack(tokens(4, 1, 16, seed=8), attention_mask=mask).masked_fill(~mask[..., None], 0.0))
        stacks.append(outs[1:])
    for one, other in zip(*stacks, strict=True):
        assert_same(one, other)


@pytest.fixture
def model() -> DecoderOnlyTransformer:
    torch.manual_seed(0)
    return DecoderOnlyTransformer(60, 32, 4, 64, 2, attention="gqa", num_groups=2).double().eval()


GENERATIONS = {
    "samples": {"num_return_sequences": 4, "temperature": 1.0},
    "samples that stop": {"num_return_sequences": 4, "temperature": 1.0, "stop_tokens": list(range(12))},
    "beams": {"num_beams": 4},
    "beams that stop": {"num_beams": 3, "num_return_sequences": 2, "stop_tokens": list(range(12))},
}


@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("conversation", [False, True], ids=["temporary", "conversation"])
def test_generations(conversation: bool, name: str, ragged: bool, model: DecoderOnlyTransformer) -> None:
    """The same tokens as with rows that hold the prompt apart; then the conversation goes on with all rows."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(60, (2, 30), generator=random)
    mask = padding([(0, 30), (8, 22)], 30) if ragged else None
    found = []
    for least in (0, APART):
        model.disable_cache()
        if conversation:
            model.enable_cache()
            model.generate(ids[:, :9], max_new_tokens=2)
        with tuned(min_shared_bytes=least):
            options = dict(GENERATIONS[name])
            if "temperature" in options:
                options["generator"] = torch.Generator().manual_seed(3)
            written = [model.generate(ids, mask, max_new_tokens=20, **options)]
            if conversation:
                rows = model.kv_cache.batch
                found_bytes = model.kv_cache.nbytes_used
                written += [model.kv_cache.lengths, model.generate(ids[:1].expand(rows, -1), max_new_tokens=5)]
        found.append((written, found_bytes if conversation else 0))
    (shared, shared_bytes), (apart, apart_bytes) = found
    for one, other in zip(shared, apart, strict=True):
        assert torch.equal(one, other)
    if conversation and shared[1].shape[0] > 2:
        assert shared_bytes < apart_bytes


def test_a_prompt_is_read_once_for_all_its_beams(model: DecoderOnlyTransformer) -> None:
    """Also where the conversation of the model then reads the best continuations."""
    rows = []
    model.enable_cache()
    model.register_forward_pre_hook(lambda _, given: rows.append(tuple(given[0].shape)))
    model.generate(torch.randint(60, (1, 30)), max_new_tokens=4, num_beams=3, num_return_sequences=3)
    assert [shape for shape in rows if shape[1] >= 30] == [(1, 30)] * 2, "one for the search, one for the conversation"
