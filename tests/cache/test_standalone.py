"""Cache without a model: `get` gives exactly what `update` has appended."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.conversations import assert_same, numbers
from tests.setups import tokens
from transformer import KVCache, MultiHeadAttention
from transformer.errors import (
    ArgumentError,
    AttentionError,
    CacheFullError,
    CacheStateError,
    DeviceError,
    DtypeError,
    ShapeError,
)

Pair = tuple[Tensor, Tensor]


def new(**options: object) -> KVCache:
    return KVCache(**{"num_layers": 3, "num_kv_heads": 2, "head_dim": 4, **options})


def pair(length: int, batch: int = 2, seed: int = 0) -> Pair:
    """Keys and values [B, 2, length, 4]; a shorter pair of the same seed is not the beginning of a longer one."""
    return tokens(batch, 2, length, 4, seed=2 * seed), tokens(batch, 2, length, 4, seed=2 * seed + 1)


def part(whole: Pair, begin: int, end: int) -> Pair:
    return whole[0][:, :, begin:end], whole[1][:, :, begin:end]


def fed(length: int = 6, **options: object) -> KVCache:
    """Layer 0 with tokens and a source, layer 1 with fewer tokens, layer 2 never used."""
    cache = new(**options)
    with torch.no_grad():
        cache.update(0, "self", *part(pair(20), 0, length))
        cache.update(0, "cross", *pair(5, seed=9))
        cache.update(1, "self", *part(pair(20, seed=1), 0, length - 1))
    return cache


def cache_snapshot(cache: KVCache) -> object:
    kept = [snapshot_of(cache, layer, kind) for layer in range(3) for kind in ("self", "cross")]
    return kept, cache.length, cache.lengths.tolist(), cache.batch


def snapshot_of(cache: KVCache, layer: int, kind: str) -> object:
    try:
        return [numbers(tensor) for tensor in cache.get(layer, kind)]
    except CacheStateError:
        return None


@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=6),
    st.sampled_from([None, 700]),
    st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_tokens_come_out_as_they_went_in(lengths: list[int], max_length: int | None, recorded: list[bool]) -> None:
    """However they are cut, whether or not gradients are recorded in between: the concatenation of all."""
    whole, cache, end = pair(sum(lengths)), new(max_length=max_length), 0
    for length, grad in zip(lengths, recorded, strict=False):
        with torch.set_grad_enabled(grad):
            cached = cache.update(1, "self", *part(whole, end, end + length))
        end += length
        assert_same(cached, part(whole, 0, end), atol=0)
        assert cache.length == end
    if end:
        assert_same(cache.get(1, "self"), whole, atol=0)
        assert_same(cache.get(1, "self", end // 2), part(whole, 0, end // 2), atol=0)
        assert cache.lengths.tolist() == [end, end]


@torch.no_grad()
def test_nothing_is_allocated_before_the_first_update() -> None:
    cache = new(max_length=10)
    assert (cache.initialized, cache.length, cache.nbytes, cache.batch) == (False, 0, 0, None)
    cached = cache.update(2, "self", *pair(3))
    assert (cache.initialized, cache.length, cache.batch) == (True, 3, 2)
    assert repr(cache) == f"KVCache(layers={len(cache.layers)}, length=3, cached_length=3, nbytes={cache.nbytes})"
    assert cache.nbytes == 2 * 2 * 2 * 10 * 4 * 8
    places = [tensor.data_ptr() for tensor in cached]
    for _ in range(7):
        cached = cache.update(2, "self", *pair(1))
    assert [tensor.data_ptr() for tensor in cached] == places, "in place, and a view"
    assert cache.nbytes == 2 * 2 * 2 * 10 * 4 * 8
    assert cache.clear() is cache
    assert (cache.initialized, cache.length, cache.nbytes) == (False, 0, 0)
    cache.update(0, "self", *pair(1, batch=5))
    assert cache.batch == 5


@torch.no_grad()
def test_growth_is_amortised() -> None:
    cache, places = new(), set()
    for _ in range(600):
        places.add(cache.update(0, "self", *pair(1))[0].untyped_storage().nbytes())
    assert len(places) <= 5


@torch.no_grad()
def test_a_source_is_replaced_as_it_is() -> None:
    cache = new()
    for length, seed in ((7, 1), (3, 2)):
        given_pair = pair(length, seed=seed)
        cached = cache.update(0, "cross", *given_pair)
        assert [a.data_ptr() for a in cached] == [a.data_ptr() for a in given_pair]
        assert_same(cache.get(0, "cross"), given_pair, atol=0)
        assert_same(cache.get(0, "cross", 2), part(given_pair, 0, 2), atol=0)
    assert cache.length == 0
    with torch.inference_mode():
        cache.update(0, "cross", *pair(4))
    assert not cache.get(0, "cross")[0].is_inference()


def test_gradients_run_through_it_and_detach_cuts() -> None:
    cache, first = new(), [tensor.requires_grad_() for tensor in pair(3)]
    cache.update(0, "self", *first)
    cache.update(0, "self", *pair(2, seed=1))[0].sum().backward()
    assert (first[0].grad == 1).all()
    keys, _ = cache.detach().update(0, "self", *pair(2, seed=2))
    assert not keys.requires_grad


WRONG: dict[str, tuple[type[AttentionError], str, Callable[[KVCache], object]]] = {
    "layer too large": (ArgumentError, "layer: expected a whole number from 0 to 2, got 3", lambda c: c.get(3, "self")),
    "layer negative": (ArgumentError, "layer: .*got -1", lambda c: c.update(-1, "self", *pair(1))),
    "layer bool": (ArgumentError, "layer: .*got True", lambda c: c.update(True, "self", *pair(1))),
    "kind": (ArgumentError, "kind: expected 'self' or 'cross', got 'both'", lambda c: c.update(0, "both", *pair(1))),
    "no tensor": (ArgumentError, "keys: expected a tensor", lambda c: c.update(0, "self", None, pair(1)[1])),
    "rank": (ShapeError, r"keys: expected shape \[B, 2, L, 4\]", lambda c: c.update(0, "self", *pair(1)[0])),
    "heads": (ShapeError, "keys: expected shape", lambda c: c.update(0, "self", *[t[:, :1] for t in pair(1)])),
    "width": (ShapeError, "keys: expected shape", lambda c: c.update(0, "cross", *[t[..., :3] for t in pair(1)])),
    "values": (ShapeError, "values: expected shape", lambda c: c.update(0, "self", pair(1)[0], pair(2)[1])),
    "batch": (ShapeError, "keys: expected 2 rows, as the cache, got 3", lambda c: c.update(0, "self", *pair(1, 3))),
    "batch of another layer": (ShapeError, "keys: expected 2 rows", lambda c: c.update(2, "cross", *pair(1, 1))),
    "dtype": (
        DtypeError,
        "keys: expected torch.float64, as the cache, got torch.float32",
        lambda c: c.update(2, "self", *[t.float() for t in pair(1)]),
    ),
    "dtype of values": (DtypeError, "values: expected", lambda c: c.update(0, "self", pair(1)[0], pair(1)[1].half())),
    "integers": (DtypeError, "keys: expected a float", lambda c: c.update(0, "self", *[t.long() for t in pair(1)])),
    "device": (
        DeviceError,
        "keys: expected to be on cpu, as the cache, got meta",
        lambda c: c.update(0, "cross", *[t.to("meta") for t in pair(1)]),
    ),
    "device of values": (
        DeviceError,
        "values: expected to be on cpu",
        lambda c: c.update(0, "self", pair(1)[0], pair(1)[1].to("meta")),
    ),
    "full": (CacheFullError, "max_cache_length: .*holds 6", lambda c: c.update(0, "self", *pair(4))),
    "nothing there": (CacheStateError, "layer 1 holds nothing of kind 'cross'", lambda c: c.get(1, "cross")),
    "beyond": (ArgumentError, "length: expected a whole number from 0 to 6", lambda c: c.get(0, "self", 7)),
    "beyond the source": (ArgumentError, "length: .*from 0 to 5", lambda c: c.get(0, "cross", 6)),
    "no length": (ArgumentError, "length: .*got 2.0", lambda c: c.get(0, "self", 2.0)),
    "to integers": (ArgumentError, "dtype: expected None or a float dtype", lambda c: c.to(dtype=torch.int64)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_and_nothing_changes(name: str) -> None:
    kind, message, call = WRONG[name]
    cache = fed(max_length=9)
    before = cache_snapshot(cache)
    with pytest.raises(kind, match=message):
        call(cache)
    assert cache_snapshot(cache) == before
    cache.update(0, "self", *pair(3))


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim", "max_length"])
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2"])
def test_sizes_that_cannot_be_are_refused(name: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=rf"^{name}: expected a whole number of at least 1"):
        new(**{name: value})
    with pytest.raises(ArgumentError, match=r"^dtype: expected None or a float dtype"):
        new(dtype=torch.int32)


@torch.no_grad()
def test_dtype_and_device_are_those_given_else_the_first() -> None:
    cache = new(dtype=torch.float32, device="cpu")
    with pytest.raises(DtypeError, match=r"^keys: expected torch\.float32, as the cache, got torch\.float64"):
        cache.update(0, "self", *pair(1))
    with pytest.raises(DeviceError, match=r"^keys: expected to be on cpu"):
        cache.update(0, "self", *[t.float().to("meta") for t in pair(1)])
    assert not cache.initialized
    cache.update(0, "self", *[t.float() for t in pair(1)])
    for other in (cache, cache.fork()):
        other.to(dtype=torch.float64).update(1, "self", *pair(1))
        assert other.clear().to("cpu").update(2, "cross", *pair(1))[0].dtype == torch.float64


@torch.no_grad()
@pytest.mark.parametrize("max_length", [None, 20])
def test_operations(max_length: int | None, tmp_path: Path) -> None:
    """Each operation leaves a cache that continues as if it had always had this content."""
    whole, source = pair(20), pair(5, seed=9)

    def goes_on(cache: KVCache, rows: list[int], length: int) -> None:
        chosen = tuple(t[rows] for t in whole)
        assert cache.lengths.tolist() == [length] * len(rows)
        assert_same(cache.get(0, "self"), part(chosen, 0, length), atol=0)
        assert_same(cache.get(0, "cross"), tuple(t[rows] for t in source), atol=0)
        cached = cache.update(0, "self", *part(chosen, length, length + 4))
        assert_same(cached, part(chosen, 0, length + 4), atol=0)
        assert_same(cache.get(1, "self", 2), part(tuple(t[rows] for t in pair(20, seed=1)), 0, 2), atol=0)
        with pytest.raises(CacheStateError, match="holds nothing"):
            cache.get(2, "self")

    cache = fed(max_length=max_length)
    fork = cache.fork()
    goes_on(cache, [0, 1], 6)
    goes_on(fork, [0, 1], 6)
    goes_on(cache.truncate(3), [0, 1], 3)
    goes_on(cache.select([1, 0, 1]).truncate(4), [1, 0, 1], 4)
    goes_on(KVCache.join([fed(max_length=max_length), fork.truncate(6).select([0])]), [0, 1, 0], 6)
    goes_on(copy.deepcopy(fed(max_length=max_length)), [0, 1], 6)
    goes_on(pickle.loads(pickle.dumps(fed(max_length=max_length))), [0, 1], 6)
    goes_on(fed(max_length=max_length).reserve(9).detach().to("cpu"), [0, 1], 6)
    cache = fed(max_length=max_length)
    cache.save(tmp_path / "cache")
    assert cache.nbytes_used == 2 * 2 * 2 * 4 * 8 * (6 + 5 + 5)
    loaded = KVCache.load(tmp_path / "cache")
    assert cache_snapshot(loaded) == cache_snapshot(cache)
    assert loaded.nbytes == cache.nbytes_used
    goes_on(loaded, [0, 1], 6)
    if max_length is not None:
        goes_on(cache.freeze_layout(), [0, 1], 6)


@torch.no_grad()
def test_a_transaction_puts_everything_back() -> None:
    def fails(cache: KVCache) -> None:
        with cache.transaction():
            cache.update(0, "self", *pair(3, seed=5))
            cache.truncate(2)
            cache.update(0, "self", *pair(30, seed=6))
            cache.update(2, "self", *pair(3, seed=7))
            cache.update(0, "cross", *pair(4, seed=8))
            raise ZeroDivisionError

    cache = fed()
    before = cache_snapshot(cache)
    with pytest.raises(ZeroDivisionError):
        fails(cache)
    assert cache_snapshot(cache) == before


@torch.no_grad()
def test_rows_of_different_lengths_go_on() -> None:
    whole, joint = pair(20), KVCache.join([fed(3), fed(6)])
    assert joint.lengths.tolist() == [3, 3, 6, 6]
    keys, _ = joint.update(0, "self", *(torch.cat((tensor[:, :, 10:11],) * 2) for tensor in whole))
    assert_same(keys[:2, :, :4], torch.cat((whole[0][:, :, :3], whole[0][:, :, 10:11]), 2), atol=0)
    assert (keys[:2, :, 4:] == 0).all()
    assert_same(keys[2:], torch.cat((whole[0][:, :, :6], whole[0][:, :, 10:11]), 2), atol=0)


@torch.no_grad()
def test_a_model_feeds_its_own() -> None:
    """A live view, or layers by module path, take no update; numbered layers without a model do."""
    x = torch.randn(2, 3, 8)
    model = nn.ModuleDict(
        {"first": MultiHeadAttention(8, 2, True, True), "second": MultiHeadAttention(8, 2, True, True)}
    )
    numbered = nn.ModuleList(model.values())
    for module in numbered:
        module(x)
    before = model["first"].kv_cache["key"].clone()
    for cache in (KVCache.from_model(model), KVCache.from_model(model).fork(), KVCache.from_model(numbered)):
        for call in (cache.get, lambda *a, c=cache: c.update(*a, *pair(1))):
            with pytest.raises(CacheStateError, match=r"^layer: expected a cache whose layers have numbers"):
                call(0, "self")
    assert torch.equal(model["first"].kv_cache["key"], before)
    cache = KVCache.from_model(numbered).remove(numbered)
    keys, _ = cache.update(0, "self", *[t.float() for t in pair(1)])
    assert_same(keys[:, :, :3], before, atol=0)
    with pytest.raises(ArgumentError, match=r"^model: expected a model with the layers that made this cache.*position"):
        new(num_layers=2).install(numbered)


def test_a_recompute_inside_backward_is_refused() -> None:
    cache, x = new(), pair(2)[0].requires_grad_()
    with pytest.raises(CacheStateError, match=r"^kv_cache: a recompute inside backward"):
        checkpoint(lambda t: cache.update(0, "self", t, t)[0] * t, x, use_reentrant=False).sum().backward()
    assert cache.length == 2
