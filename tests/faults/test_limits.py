"""`max_cache_length`: limit - 1, limit and limit + 1 for each kind of cache."""

from __future__ import annotations

import pytest
import torch

from tests.conversations import assert_same, cache_snapshot
from tests.oracle import Conversation, Options
from tests.setups import build, padding, tokens
from tests.storages import address
from transformer.errors import ArgumentError, CacheFullError

LIMIT = 6
SLIDING, SINKS = {"window_size": 3}, {"window_size": 3, "num_sinks": 3}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("options", [{}, SLIDING, SINKS], ids=["expanding", "sliding", "sinks"])
@pytest.mark.parametrize("first", [0, 2, 4, 5])
def test_expanding_to_the_limit(first: int, options: dict, grad: bool) -> None:
    """Expanding calls, of modules that may slide too: limit - 1 and limit are taken, limit + 1 is refused."""
    for total, fits in ((LIMIT - 1, True), (LIMIT, True), (LIMIT + 1, False), (3 * LIMIT, False)):
        module, straight = build(Options(**options), max_cache_length=LIMIT), build(Options(**options))
        with torch.set_grad_enabled(grad):
            for model in (module, straight):
                model(tokens(2, first, 16), None, True)
            x, before = tokens(2, total - first, 16, seed=1), cache_snapshot(module)
            if not fits:
                for _ in range(2):
                    with pytest.raises(CacheFullError, match=f"^max_cache_length: .*{LIMIT}.*holds {first}.*{total}"):
                        module(x, None, True)
                    assert cache_snapshot(module) == before
                x = x[:, : LIMIT - first]
            assert_same(module(x, None, True), straight(x, None, True))
            assert module.kv_cache.cached_length == min(total, LIMIT)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("options", [SLIDING, SINKS], ids=["sliding", "sinks"])
def test_sliding_never_meets_a_limit_that_its_window_fits_in(options: dict, grad: bool) -> None:
    """Also for a limit of exactly window and sinks, and for chunks longer than the limit."""
    least = options["window_size"] + options.get("num_sinks", 0)
    rules = Options(**options)
    for limit in (least, least + 1):
        module = build(rules, max_cache_length=limit)
        oracle = Conversation(module, rules)
        with torch.set_grad_enabled(grad):
            for step, length in enumerate((1, 2, 1, 1, 9, 1, 4, 1)):
                x = tokens(1, length, 16, seed=step)
                assert_same(module(x).detach(), oracle.call(x)[0])
                assert module.kv_cache.cached_length == oracle.cached_lengths[0] <= least


def test_sliding_makes_room_and_expanding_fills_it() -> None:
    """The mode may change from call to call; what counts is what would be held after the call."""
    module = build(Options(window_size=3), max_cache_length=LIMIT)
    with torch.no_grad():
        for length, mode, held in ((6, True, 6), (1, None, 3), (3, True, 6), (2, None, 3), (1, True, 4)):
            module(tokens(1, length, 16), None, mode)
            assert module.kv_cache.cached_length == held
        before = cache_snapshot(module)
        with pytest.raises(CacheFullError):
            module(tokens(1, 3, 16), None, True)
    assert cache_snapshot(module) == before


def test_a_window_that_was_not_given_has_to_fit() -> None:
    module = build(Options(), max_cache_length=LIMIT)
    with torch.no_grad():
        with pytest.raises(CacheFullError):
            module(tokens(1, LIMIT + 1, 16), None, False)
        assert module.kv_cache is None
        module(tokens(1, LIMIT, 16), None, False)
        for step in range(10):
            module(tokens(1, 1 + step % 3, 16, seed=step), None, False)
    assert (module.kv_cache.cached_length, module.kv_cache.length) == (LIMIT, LIMIT + 19)


def test_each_row_has_the_whole_limit() -> None:
    module = build(Options(), max_cache_length=LIMIT)
    with torch.no_grad():
        module(tokens(3, 9, 16), attention_mask=padding([(3, 6), (0, 1), (0, 0)], 9))
        before = cache_snapshot(module)
        with pytest.raises(CacheFullError):
            module(tokens(3, 2, 16), attention_mask=padding([(0, 1), (0, 1), (0, 1)], 2))
        assert cache_snapshot(module) == before
        module(tokens(3, 6, 16), attention_mask=padding([(0, 0), (1, 5), (0, 6)], 6))
    assert module.kv_cache.cached_lengths.tolist() == [LIMIT] * 3


@pytest.mark.parametrize("options", [{}, SINKS], ids=["expanding", "sinks"])
def test_a_limit_is_allocated_once(options: dict) -> None:
    """From the first token to the last: the same buffers, the same bytes."""
    module = build(Options(**options), max_cache_length=300)
    sizes, addresses = set(), set()
    with torch.no_grad():
        for _ in range(60):
            module(tokens(1, 5, 16))
            sizes.add(module.kv_cache.nbytes)
            addresses.add(address(module.kv_cache["key"]))
    assert len(sizes) == 1
    if not options:
        assert len(addresses) == 1


@pytest.mark.parametrize("options", [{}, SINKS], ids=["expanding", "sinks"])
def test_room_can_be_reserved_up_to_the_limit(options: dict) -> None:
    """The reserved tokens then cost no allocation; more than the limit, or no whole number, is refused unchanged."""
    module, plain = build(Options(**options), max_cache_length=20), build(Options(**options))
    with torch.no_grad():
        x = tokens(2, 5, 16)
        module(x, None, True), plain(x, None, True)
        before = cache_snapshot(module)
        for wrong, error in ((16, CacheFullError), (10**6, CacheFullError), (-1, ArgumentError), (2.5, ArgumentError)):
            with pytest.raises(error, match=r"^tokens: "):
                module.kv_cache.reserve(wrong)
            assert cache_snapshot(module) == before
        module.kv_cache.reserve(15)
        before = address(module.kv_cache["key"]), module.kv_cache.nbytes
        for step in range(15):
            x = tokens(2, 1, 16, seed=step)
            assert_same(module(x, None, True), plain(x, None, True))
        assert (address(module.kv_cache["key"]), module.kv_cache.nbytes) == before
        with pytest.raises(CacheFullError):
            module.kv_cache.reserve(1)
