"""Operations on rows that share a prefix, and their bytes: as of the same rows that hold their tokens apart."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

from tests.cache.shared_rows import KINDS, PROMPTS, Pair
from tests.setups import build, padding, tokens
from tests.storages import alive_since
from transformer import GroupQueryAttention, KVCache, LayerCache
from transformer.kernels import tuned


class Stop(Exception):  # noqa: N818
    """Ends a transaction."""


@pytest.mark.parametrize("name", PROMPTS)
def test_truncated(name: str, dtype: torch.dtype) -> None:
    """Above the shared tokens, to their end, into them, below the shortest of them, and to nothing."""
    pair = Pair(build(KINDS["GQA"], dtype=dtype), dtype, name)
    pair.say(5)
    for length in (12, 9, 8, 5, 2, 0):
        pair.both(lambda cache, length=length: cache.truncate(min(length, cache.length)))
        pair.check()
        pair.say(1)
        pair.say(3, padding([(0, 1 + row % 3) for row in range(pair.apart.batch)], 3))
        pair.both(lambda cache, length=length: cache.truncate(min(length, cache.length)))
        assert pair.shares == (length > 0)
    assert pair.shared.nbytes == pair.apart.batch * 69 * 2 * 2 * 4 * dtype.itemsize, "the prompt itself is gone"


@pytest.mark.parametrize("name", PROMPTS)
def test_selected_again(name: str, dtype: torch.dtype) -> None:
    """Reordered and repeated as beams, rows that leave, prompts that leave, and one that is left."""
    pair = Pair(build(KINDS["GQA"], dtype=dtype), dtype, name)
    pair.say(2)
    for rows in ([1, 0, 3, 3], [3, 1, 0, 0, 2], [0, 4, 4], [2, 1, 0], [1, 1]):
        pair.select(rows)
        pair.check()
        pair.say(1)
        pair.say(1, padding([(0, row % 2) for row in range(len(rows))], 1))
    pair.select([1])
    pair.check()
    views = [pair.shared["key"] for _ in range(2)]
    assert views[0].data_ptr() == views[1].data_ptr(), "nothing is shared any more, so its tokens lie together again"
    pair.say(1)
    pair.select([0, 0, 0])
    pair.say(1)
    assert pair.shares


def test_a_row_that_went_far_is_shared_whole(dtype: torch.dtype) -> None:
    """Where a repeated row's own tokens are more than copying all of them once costs, they are shared too."""
    pair = Pair(build(KINDS["GQA"], dtype=dtype), dtype, "one prompt")
    pair.say(40)
    pair.select([1, 1, 3, 1, 1])
    pair.check()
    assert pair.shared.nbytes_used * 5 == pair.apart.nbytes_used * 2
    pair.say(1)
    pair.say(3)
    pair.both(lambda cache: cache.truncate(20))
    pair.say(2)


@pytest.mark.parametrize("name", PROMPTS)
def test_forks_go_their_own_ways(name: str, dtype: torch.dtype) -> None:
    """Of the prompt before it was shared, and of rows that share it; each continues in turns, truncates and selects."""
    module = build(KINDS["GQA"], dtype=dtype)
    pair = Pair(module, dtype, name)
    pair.say(1)
    other = copy.copy(pair)
    other.shared, other.apart, other.count = pair.shared.fork(), pair.apart.fork(), 500
    for turn in range(3):
        for each in (pair, other):
            each.say(1 + turn)
        pair.both(lambda cache: cache.truncate(cache.length - 2))
        other.select([1, 0, *range(2, other.apart.batch)])
        pair.check()
        other.check()
    pair.both(lambda cache: cache.truncate(2))
    other.say(1)
    pair.say(4)
    other.check()


def test_the_prompt_goes_on_beside_its_samples(dtype: torch.dtype) -> None:
    """A fork of the prompt keeps its buffers: neither its new tokens nor other ones in place of old ones are read."""
    module = build(KINDS["GQA"], dtype=dtype)
    with torch.no_grad():
        module(tokens(1, 200, 16, seed=99, dtype=dtype))
    before = module.kv_cache
    samples = before.fork()
    with tuned(min_shared_bytes=0):
        samples.select([0] * 4)
    key, value = samples["key"].clone(), samples["value"].clone()
    assert before.nbytes < samples.nbytes + 1 < 2 * before.nbytes
    for length in (200, 190):
        before.truncate(length)
        module.kv_cache = before
        with torch.no_grad():
            module(tokens(1, 5, 16, seed=3, dtype=dtype))
    assert torch.equal(samples["key"], key)
    assert torch.equal(samples["value"], value)


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("path", ["file", "pickle", "deepcopy", "detach", "to and back", "module"])
def test_taken_along(path: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    module = build(KINDS["GQA"], dtype=dtype)
    pair = Pair(module, dtype, name)
    pair.say(2)

    def moved(cache: LayerCache) -> LayerCache:
        if path == "file":
            cache.save(tmp_path / "saved")
            return LayerCache.load(tmp_path / "saved")
        if path == "pickle":
            return pickle.loads(pickle.dumps(cache))
        if path == "deepcopy":
            return copy.deepcopy(cache)
        if path == "detach":
            return cache.detach()
        if path == "to and back":
            return cache.to(dtype=torch.float64).to("cpu", dtype)
        module.kv_cache = cache
        return module.to(dtype).kv_cache

    pair.both(moved)
    pair.check()
    assert pair.shares
    pair.say(1)
    pair.say(2)
    pair.select([1, 1, 0, 2])
    pair.say(1)


def test_joined(dtype: torch.dtype) -> None:
    module = build(KINDS["GQA"], dtype=dtype)
    pair, other = Pair(module, dtype, "one prompt"), Pair(module, dtype, "ragged", seed=40)
    pair.say(2)
    other.say(1)
    pair.shared = LayerCache.join([pair.shared, other.shared])
    pair.apart = LayerCache.join([pair.apart, other.apart])
    pair.check()
    pair.say(2)
    other.say(1)


def test_reserved(dtype: torch.dtype) -> None:
    """Slots are for tokens of the rows' own; those that were reserved before the prompt was shared are counted less."""
    module = build(KINDS["GQA"], dtype=dtype)
    module.kv_cache = module.new_cache().reserve(300)
    with torch.no_grad():
        module(tokens(1, 200, 16, dtype=dtype))
    cache = module.kv_cache
    with tuned(min_shared_bytes=0):
        cache.select([0] * 4)
    token = 2 * 2 * 4 * dtype.itemsize
    with torch.no_grad():
        module(tokens(4, 1, 16, dtype=dtype))
    assert cache.nbytes == (300 + 4 * 100) * token
    cache.reserve(500)
    assert cache.nbytes == (300 + 4 * 501) * token
    with torch.no_grad():
        module(tokens(4, 500, 16, dtype=dtype))
    assert cache.nbytes == (300 + 4 * 501) * token


def test_a_fork_of_what_was_undone(dtype: torch.dtype) -> None:
    """The prompt, as it is after a transaction that had shared it, writes over nothing that a fork still reads."""
    module = build(KINDS["GQA"], dtype=dtype)
    with torch.no_grad():
        module(tokens(1, 200, 16, seed=99, dtype=dtype))
    cache, forks = module.kv_cache, []

    def guess() -> None:
        with KVCache.from_model(module).transaction(), tuned(min_shared_bytes=0):
            forks.append(cache.select([0] * 4).fork())
            raise Stop

    with torch.no_grad(), pytest.raises(Stop):
        guess()
    key, value = forks[0]["key"].clone(), forks[0]["value"].clone()
    cache.truncate(150)
    with torch.no_grad():
        module(tokens(1, 5, 16, seed=3, dtype=dtype))
    assert torch.equal(forks[0]["key"], key)
    assert torch.equal(forks[0]["value"], value)


def test_a_prompt_in_large_buffers_is_copied_out_of_them() -> None:
    """Where the slots after it take more than sharing saves."""
    module = GroupQueryAttention(16, 4, 2, True, True, max_cache_length=5000)
    with torch.no_grad(), alive_since() as grown, tuned(min_shared_bytes=0):
        module(torch.randn(1, 100, 16))
        module.kv_cache.select([0, 0])
    assert grown.bytes == module.kv_cache.nbytes == 100 * 2 * 2 * 4 * 4


def test_rolled_back(dtype: torch.dtype) -> None:
    """Nothing is left of a transaction that continues, truncates into the prefix, continues again, and selects."""
    module = build(KINDS["GQA"], dtype=dtype)
    pair = Pair(module, dtype, "two")
    pair.say(1)
    kept = pair.apart.fork()
    module.kv_cache = pair.shared

    def guess() -> None:
        with KVCache.from_model(module).transaction(), tuned(min_shared_bytes=0):
            module(tokens(6, 3, 16, seed=7, dtype=dtype))
            pair.shared.truncate(4)
            module(tokens(6, 6, 16, seed=8, dtype=dtype))
            pair.shared.select([0, 0, 5])
            module(tokens(3, 1, 16, seed=9, dtype=dtype))
            raise Stop

    with torch.no_grad(), pytest.raises(Stop):
        guess()
    pair.apart = kept
    pair.check()
    pair.say(1)
    pair.say(2)


def test_bytes(dtype: torch.dtype) -> None:
    """A shared prompt is there once, as the allocator says: 16 rows of it take little more than one."""
    module = GroupQueryAttention(16, 4, 2, True, True, dtype=dtype)
    token = 2 * 2 * 4 * dtype.itemsize
    with torch.no_grad(), alive_since() as grown, tuned(min_shared_bytes=0):
        module(torch.randn(1, 4096, 16, dtype=dtype))
        module.kv_cache.select([0] * 16)
        module(torch.randn(16, 1, 16, dtype=dtype))
    assert grown.bytes == module.kv_cache.nbytes == (4096 + 64 + 16 * 65) * token
    assert module.kv_cache.nbytes_used == (4096 + 16) * token
    assert module.kv_cache.nbytes < 16 * 4096 * token / 10


def test_prompts_that_leave_are_freed() -> None:
    module = GroupQueryAttention(16, 4, 2, True, True)
    with torch.no_grad(), tuned(min_shared_bytes=0):
        module(torch.randn(4, 1000, 16))
        module.kv_cache.select([0, 0, 1, 1, 2, 2, 3, 3])
        module(torch.randn(8, 1, 16))
    with torch.no_grad(), alive_since() as grown:
        module.kv_cache.select([0, 1, 6, 7])
    token = 2 * 2 * 4 * 4
    assert grown.bytes == -(4 * 1064 - 2 * 1000 + 4 * 65) * token


def test_a_row_that_is_left_goes_on_in_place() -> None:
    """Its tokens are copied once, with the free slots that it had."""
    module = GroupQueryAttention(16, 4, 2, True, True)
    with torch.no_grad(), tuned(min_shared_bytes=0):
        module(torch.randn(1, 1000, 16))
        module.kv_cache.select([0] * 4)
        module(torch.randn(4, 1, 16))
        module.kv_cache.select([2])
        nbytes = module.kv_cache.nbytes
        module(torch.randn(1, 1, 16))
    assert module.kv_cache.nbytes == nbytes == (1000 + 65) * 2 * 2 * 4 * 4


def test_few_bytes_are_copied() -> None:
    """Two parts of a step take longer than one, so what saves little is copied."""
    module = GroupQueryAttention(16, 4, 2, True, True)
    with torch.no_grad():
        module(torch.randn(1, 10, 16))
    module.kv_cache.select([0, 0])
    assert module.kv_cache.nbytes_used == 2 * 10 * 2 * 2 * 4 * 4
