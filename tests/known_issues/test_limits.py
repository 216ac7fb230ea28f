"""Full caches, other batches, other dtypes and resets: refused before anything changes, or correct."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import nn

from tests.conversations import assert_same, cache_snapshot
from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens
from transformer.errors import CacheFullError, DtypeError, ShapeError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("scheme", ["none", "rotary halves", "alibi"])
def test_the_token_past_the_limit_is_refused(scheme: str, grad: bool) -> None:
    """Issues: transformers#39593 #35711, torchtune past its limit (empty message). A full static cache ended in a raw
    index error or a device assert, with its length already moved. limit - 1 and limit are taken, limit + 1 is refused,
    twice, with nothing moved; what fits is still taken afterwards."""
    options = Options(scheme=SCHEMES[scheme])
    module, unlimited = build(options, max_cache_length=6), build(options)
    with torch.set_grad_enabled(grad):
        for length in (5, 1):
            x = tokens(2, length, 16, seed=length)
            assert_same(module(x), unlimited(x))
        before = cache_snapshot(module)
        for length in (1, 1, 4, 7):
            with pytest.raises(CacheFullError, match="max_cache_length") as error:
                module(tokens(2, length, 16))
            assert "6" in str(error.value), "the limit is named"
            assert cache_snapshot(module) == before
        assert module(tokens(2, 0, 16)).shape == (2, 0, 16)
        # A sliding call evicts all tokens beyond its window, so there is room again.
        x = tokens(2, 3, 16, seed=3)
        module.kv_cache.clear()
        assert_same(module(x), build(options)(x))


def test_a_chunk_over_the_rest_of_the_room() -> None:
    """Issues: transformers#39593. With 2 of 6 slots left a chunk of 3 is refused whole, then one of 2 is taken as if
    nothing had been tried."""
    module, plain = build(Options(), max_cache_length=6), build(Options())
    first, last = tokens(1, 4, 16, seed=1), tokens(1, 2, 16, seed=2)
    with torch.no_grad():
        module(first), plain(first)
        with pytest.raises(CacheFullError, match="holds 4"):
            module(tokens(1, 3, 16))
        assert torch.equal(module(last), plain(last))
        nbytes = module.kv_cache.nbytes
        with pytest.raises(CacheFullError):
            module(tokens(1, 1, 16))
    assert module.kv_cache.nbytes == nbytes


def test_the_longest_row_meets_the_limit() -> None:
    """Issues: transformers#35711. The limit is of tokens held, row by row; padding takes no room."""
    module = build(Options(), max_cache_length=4)
    with torch.no_grad():
        module(tokens(2, 9, 16), attention_mask=padding([(5, 4), (2, 1)], 9))
        module(tokens(2, 3, 16), attention_mask=padding([(0, 0), (0, 3)], 3))
        before = cache_snapshot(module)
        with pytest.raises(CacheFullError):
            module(tokens(2, 1, 16), attention_mask=padding([(0, 0), (0, 1)], 1))
    assert cache_snapshot(module) == before
    assert module.kv_cache.cached_lengths.tolist() == [4, 4]


@pytest.mark.parametrize("other", [1, 2, 4])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("window", [None, 2])
def test_another_batch_is_refused(window: int | None, grad: bool, other: int) -> None:
    """Issues: torchtune#1600 (reproduced). A smaller batch was broadcast into a larger cache."""
    module, plain = (build(Options(window_size=window)) for _ in range(2))
    with torch.set_grad_enabled(grad):
        x = tokens(3, 4, 16)
        module(x), plain(x)
        before = cache_snapshot(module)
        for length in (1, 3, 0):
            with pytest.raises(ShapeError, match="3 rows"):
                module(tokens(other, length, 16))
            with pytest.raises(ShapeError, match="3 rows"):
                module(tokens(other, 2, 16), attention_mask=torch.ones(other, 2, dtype=torch.bool))
        assert cache_snapshot(module) == before
        x = tokens(3, 1, 16, seed=1)
        assert torch.equal(module(x), plain(x))


@pytest.mark.parametrize("other", [1, 2, 4])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_another_batch_is_refused_with_a_shared_step_too(grad: bool, other: int) -> None:
    """Issues: torchtune#1600 (reproduced). The same where the step was planned by a layer of another batch
    that has seen as many tokens."""
    module, layer = build(Options()), build(Options())
    with torch.set_grad_enabled(grad):
        module(tokens(3, 4, 16)), layer(tokens(other, 4, 16))
        before = cache_snapshot(module)
        x = tokens(other, 1, 16)
        with pytest.raises(ShapeError, match="3 rows"):
            module(x, step=layer.plan(x))
    assert cache_snapshot(module) == before


@pytest.mark.parametrize(("held", "came"), [*permutations(FLOATS, 2)], ids=str)
def test_every_pair_of_dtypes_is_refused_or_moved(held: torch.dtype, came: torch.dtype) -> None:
    """Issues: transformers `DynamicCache`, vllm#54338, torchtune#1349. A bfloat16 cache and float32 keys: promoted
    silently, or bits reinterpreted. Tokens of another dtype, and keys of another dtype than the cache, are refused; the
    stated way is `.to`."""
    module = build(Options(scheme=SCHEMES["rotary halves"]), dtype=held)
    with torch.no_grad():
        module(tokens(1, 3, 16, dtype=held))
        before, cache = cache_snapshot(module), module.kv_cache
        with pytest.raises(DtypeError, match=r"^x: "):
            module(tokens(1, 1, 16, dtype=came))
        assert cache_snapshot(module) == before
        other = build(Options(scheme=SCHEMES["rotary halves"]), dtype=came)
        other.kv_cache = cache
        with pytest.raises(DtypeError, match=r"kv_cache.*\.to\("):
            other(tokens(1, 1, 16, dtype=came))
        assert cache_snapshot(module) == before
        values = cache["value"].clone()
        assert cache.to(dtype=came) is cache
        assert torch.equal(cache["value"], values.to(came)), "numbers are kept, not bits"
        out = other(tokens(1, 1, 16, dtype=came))
        assert out.dtype == cache["key"].dtype == came
        assert out.isfinite().all()
        assert cache.length == 4


def test_a_cache_of_another_dtype_in_autocast_is_refused() -> None:
    """Issues: vllm#54338, torchtune#1349. Autocast changes the dtype of the keys in mid-conversation."""
    module = build(Options(), dtype=torch.float32)
    with torch.no_grad():
        module(tokens(1, 3, 16, dtype=torch.float32))
        before = cache_snapshot(module)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(DtypeError, match="bfloat16"):
            module(tokens(1, 1, 16, dtype=torch.float32))
    assert cache_snapshot(module) == before


def filled(kind: str) -> nn.Module:
    """A module with something of everything to forget."""
    window = {"sliding": 3, "sinks": 3}.get(kind)
    options = Options(causal=False, window_size=window, num_sinks=2 if kind == "sinks" else 0)
    module = build(options)
    with torch.no_grad():
        module(tokens(2, 5, 16), None, False, attention_mask=padding([(0, 5), (2, 2)], 5))
        module(tokens(2, 2, 16), tokens(2, 3, 16))
    return module


@pytest.mark.parametrize("kind", ["plain", "sliding", "sinks"])
def test_a_cleared_cache_is_a_new_one(kind: str) -> None:
    """Issues: transformers#48809. Reset zeroed the buffer but kept the length. A fixed window, row lengths, the source,
    bytes, batch and dtype are all forgotten."""
    module, fresh = filled(kind), filled(kind)
    fresh.kv_cache = None
    cache = module.kv_cache
    assert cache.clear() is cache is module.kv_cache
    assert (cache.length, cache.cached_length, cache.nbytes, cache.nbytes_used, cache.window) == (0, 0, 0, 0, None)
    assert cache.lengths.tolist() == cache.cached_lengths.tolist() == []
    assert [tensor.shape[2] for tensor in cache.values()] == [0, 0]
    module, fresh = module.to(torch.float32), fresh.to(torch.float32)
    with torch.no_grad():
        for step, length in enumerate((2, 4, 1)):
            x = tokens(3, length, 16, seed=step, dtype=torch.float32)
            assert torch.equal(module(x, None, False), fresh(x, None, False))
            kv = tokens(3, 2, 16, seed=5, dtype=torch.float32)
            assert torch.equal(module(x, kv), fresh(x, kv))
            assert cache_snapshot(module) == cache_snapshot(fresh)
