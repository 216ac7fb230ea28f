"""Calls of rows that share a prefix: each gives what the same rows give that hold their tokens apart."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.cache.shared_rows import BOUND, KINDS, PROMPTS, SHARING, Pair
from tests.conversations import assert_same
from tests.faults.inject import ERRORS, Injected
from tests.setups import build, padding, tokens
from transformer import GroupQueryAttention, LayerCache
from transformer.codecs import CacheDtypes
from transformer.errors import CacheFullError
from transformer.kernels import tuned


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_chunks(kind: str, name: str, dtype: torch.dtype) -> None:
    pair = Pair(build(KINDS[kind], dtype=dtype, kind="GQA"), dtype, name)
    pair.check()
    assert pair.shares == ("window" not in kind)
    for length in (1, 1, 3, 1, 70, 1):
        pair.say(length)
    assert pair.shares == (kind in SHARING)


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kind", SHARING)
def test_rows_that_go_on_apart(kind: str, name: str, dtype: torch.dtype) -> None:
    """Some end early, as samples do; and each gets a question of its own, long or short."""
    pair = Pair(build(KINDS[kind], dtype=dtype), dtype, name)
    batch = pair.apart.batch
    for length, spans in (
        (1, [(0, row % 2) for row in range(batch)]),
        (5, [(row % 3, 1 + row % 2) for row in range(batch)]),
        (60, [(row, 60 - 9 * row) for row in range(batch)]),
        (1, [(0, int(row == 1)) for row in range(batch)]),
        (2, [(0, 0)] * batch),
    ):
        pair.say(length, padding(spans, length))
    pair.say(1)
    assert pair.shares


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("cache_dtype", ["int8", "int4", ("bfloat16", None)], ids=str)
def test_records(cache_dtype: CacheDtypes, name: str, dtype: torch.dtype) -> None:
    """Of a cache with codecs: a prefix of records, which stand for the same numbers."""
    pair = Pair(build(replace(KINDS["GQA"], head_dim=16), dtype=dtype, cache_dtype=cache_dtype), dtype, name)
    for length in (1, 3, 40, 1):
        pair.say(length)
    pair.say(2, padding([(0, 1 + row % 2) for row in range(pair.apart.batch)], 2))
    pair.both(lambda cache: cache.truncate(8))
    pair.select([1, 0, 0])
    pair.say(1)
    assert pair.shares
    pair.both(copy.deepcopy)
    pair.say(1)


@pytest.mark.parametrize("name", PROMPTS)
def test_more_rows_than_the_kernel_takes_at_once(name: str, dtype: torch.dtype) -> None:
    pair = Pair(build(KINDS["MQA"], dtype=dtype), dtype, name)
    with tuned(max_compiled_query_rows=8):
        for length in (1, 2, 3):
            pair.say(length)


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize(
    "options",
    [{"return_weights": True}, {"attn_bias": torch.zeros(())}, {"expanding_context": False}],
    ids=lambda options: next(iter(options)),
)
def test_calls_that_need_rows_whole(options: dict[str, object], name: str, dtype: torch.dtype) -> None:
    """Weights, biases and windows; afterwards the conversation copies repeated rows, rather than twice."""
    pair = Pair(build(KINDS["GQA"], dtype=dtype), dtype, name)
    pair.say(1)
    assert pair.shares
    pair.say(2, **options)
    assert not pair.shares
    pair.say(1)
    pair.select([0, 0, 1])
    assert not pair.shares
    pair.say(1)


def test_gradients(dtype: torch.dtype) -> None:
    """A recorded call reads every row whole, and gives the same gradients."""
    module = build(KINDS["GQA"], dtype=dtype)
    pair = Pair(module, dtype, "ragged")
    pair.say(2)
    found = []
    for out in pair.said(3):
        module.zero_grad()
        out.sum().backward()
        found.append([parameter.grad.clone() for parameter in module.parameters()])
    for one, other in zip(*found, strict=True):
        assert_same(one, other, atol=100 * BOUND[dtype])
    pair.check()


def test_a_window_that_has_not_slid_yet(dtype: torch.dtype) -> None:
    module = build(replace(KINDS["window"], window_size=20), dtype=dtype)
    pair = Pair(module, dtype, "ragged")
    assert not pair.shares
    for length in (1, 3, 20):
        pair.say(length)


def test_a_maximum_holds_for_each_row(dtype: torch.dtype) -> None:
    """Shared tokens count as cached, and rows take slots as they need them."""
    module = build(KINDS["GQA"], dtype=dtype, max_cache_length=200)
    with torch.no_grad():
        module(tokens(1, 150, 16, dtype=dtype))
    pair = Pair.__new__(Pair)
    pair.module, pair.dtype, pair.count = module, dtype, 0
    pair.shared, pair.apart = module.kv_cache, module.kv_cache.fork()
    pair.select([0] * 8)
    pair.say(49)
    assert pair.shares
    assert pair.shared.nbytes < pair.apart.nbytes / 2
    for cache in (pair.shared, pair.apart):
        module.kv_cache = cache
        with torch.no_grad(), pytest.raises(CacheFullError, match="expected at most 200 tokens"):
            module(tokens(8, 2, 16, dtype=dtype))
    pair.say(1)
    for cache in (pair.shared, pair.apart):
        with pytest.raises(CacheFullError, match="got 1 to reserve beside the 200"):
            cache.reserve(1)


def test_a_call_that_fails_anywhere_changes_nothing(dtype: torch.dtype) -> None:
    pair = Pair(build(KINDS["GQA"], dtype=dtype), dtype, "ragged")
    pair.say(1)
    x = tokens(6, 2, 16, seed=77, dtype=dtype)
    mask = padding([(0, 1 + row % 2) for row in range(6)], 2)
    at = failed = 0
    while failed == at:
        pair.module.kv_cache = pair.shared
        with torch.no_grad():
            try:
                with Injected(at):
                    pair.module(x, attention_mask=mask)
            except tuple(ERRORS) as error:
                if "injected" not in str(error):
                    raise
                failed += 1
                pair.check()
        at += 1
    assert failed > 10
    pair.module.kv_cache = pair.apart
    with torch.no_grad():
        pair.module(x, attention_mask=mask)
    pair.check()


def test_frozen(dtype: torch.dtype) -> None:
    """A compiled step knows no prefix: the layout has each row whole. An eager call afterwards goes on with that."""
    module = build(KINDS["GQA"], dtype=dtype, max_cache_length=40)
    pair = Pair(module, dtype, "ragged")
    pair.say(2)
    pair.both(LayerCache.freeze_layout)
    pair.check()
    pair.say(1)


@pytest.mark.slow
def test_compiled_steps(dtype: torch.dtype) -> None:
    """Over the layout that a freeze makes of shared rows: the steps of rows that had their tokens apart."""
    module = build(KINDS["GQA"], dtype=dtype, max_cache_length=40).eval()
    pair = Pair(module, dtype, "ragged")
    pair.say(2)
    pair.both(LayerCache.freeze_layout)
    outs = []
    for cache in (pair.shared, pair.apart):
        module.kv_cache = cache
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            outs.append([compiled(tokens(6, 1, 16, seed=step, dtype=dtype)) for step in range(3)])
    assert_same(*outs, atol=BOUND[dtype])
    pair.say(1)


def test_tensors_without_numbers() -> None:
    module = GroupQueryAttention(16, 4, 2, True, True, device="meta")
    with torch.no_grad(), tuned(min_shared_bytes=0):
        module(torch.empty(1, 9, 16, device="meta"))
        module.kv_cache.select([0, 0, 0])
        out = module(torch.empty(3, 2, 16, device="meta"))
    assert out.shape == (3, 2, 16)
    assert module.kv_cache.lengths.tolist() == [11] * 3
