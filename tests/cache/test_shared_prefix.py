"""Rows that share a prefix: every operation gives what the same rows give that hold their tokens apart."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same
from tests.faults.inject import ERRORS, Injected
from tests.internals import without_compiled_kernels
from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens
from tests.storages import alive_since
from transformer import GroupQueryAttention, KVCache, LayerCache
from transformer.codecs import CacheDtypes
from transformer.errors import CacheFullError
from transformer.kernels import tuned

KINDS = {
    "MHA": Options(num_groups=4, scheme=SCHEMES["rotary halves"]),
    "GQA": Options(num_groups=2, scheme=SCHEMES["rotary interleaved"]),
    "MQA": Options(num_groups=1, scheme=SCHEMES["none"]),
    "soft cap, norms": Options(num_groups=2, scheme=SCHEMES["rotary halves"], softcap=1.5, qk_norm=True),
    "not causal": Options(num_groups=2, causal=False),
    "ALiBi": Options(num_groups=2, scheme=SCHEMES["alibi"]),
    "buckets": Options(num_groups=2, scheme=SCHEMES["t5 causal"]),
    "window": Options(num_groups=2, scheme=SCHEMES["rotary halves"], window_size=4),
    "window and sinks": Options(num_groups=2, scheme=SCHEMES["rotary halves"], window_size=4, num_sinks=2),
}
"""Of the last four no call reads a prefix."""

SHARING = [*KINDS][:5]
PROMPTS = {"one prompt": [9], "two": [7, 7], "ragged": [9, 3, 6]}
ROWS = {"one prompt": [0, 0, 0, 0], "two": [0, 0, 0, 1, 1, 1], "ragged": [2, 0, 0, 2, 1, 0]}
BOUND = {torch.float64: 1e-12, torch.float32: 1e-6}
"""As parts of the largest value."""


class Pair:
    """One conversation twice: with repeated rows that share their tokens, and with rows that hold them apart."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, name: str, seed: int = 0) -> None:
        self.module, self.dtype, self.count, lengths = module, dtype, seed, PROMPTS[name]
        x = tokens(len(lengths), max(lengths), 16, seed=99, dtype=dtype)
        module.kv_cache = None
        with torch.no_grad():
            module(x, attention_mask=padding([(0, length) for length in lengths], max(lengths)))
        self.shared, self.apart = module.kv_cache, module.kv_cache.fork()
        self.select(ROWS[name])

    def select(self, rows: list[int]) -> None:
        with tuned(min_shared_bytes=0):
            assert self.shared.select(rows) is self.shared
        with tuned(min_shared_bytes=1 << 40):
            self.apart.select(rows)

    def both(self, change: Callable[[LayerCache], LayerCache | None]) -> None:
        """The same operation on both; one that gives a new cache continues with that."""
        self.shared = change(self.shared) or self.shared
        self.apart = change(self.apart) or self.apart

    def said(self, length: int, mask: Tensor | None = None, **options: object) -> tuple[Tensor, Tensor]:
        self.count += 1
        x = tokens(self.apart.batch, length, 16, seed=self.count, dtype=self.dtype)
        outs = []
        for cache in (self.shared, self.apart):
            self.module.kv_cache = cache
            out = self.module(x, attention_mask=mask, **options)
            outs.append(out[0] if isinstance(out, tuple) else out)
        return outs[0], outs[1]

    @torch.no_grad()
    def say(self, length: int, mask: Tensor | None = None, **options: object) -> None:
        shared, apart = self.said(length, mask, **options)
        assert_same(shared, apart, atol=BOUND[self.dtype] * max(1.0, float(apart.abs().max())))
        self.check()

    def check(self) -> None:
        """Both hold the same."""
        for name in ("key", "value"):
            assert_same(self.shared[name].detach(), self.apart[name].detach(), atol=BOUND[self.dtype])
        for name in ("length", "cached_length", "batch", "window"):
            assert getattr(self.shared, name) == getattr(self.apart, name)
        assert self.shared.lengths.tolist() == self.apart.lengths.tolist()
        assert self.shared.cached_lengths.tolist() == self.apart.cached_lengths.tolist()
        assert self.shared.nbytes_used <= self.apart.nbytes_used

    @property
    def shares(self) -> bool:
        return self.shared.nbytes_used < self.apart.nbytes_used


@pytest.fixture(params=["float64", "float32", "float32 without numba"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """float32 is read by the compiled kernel where there is one, float64 by PyTorch's."""
    if "without" in request.param:
        without_compiled_kernels(monkeypatch)
    return torch.float64 if request.param == "float64" else torch.float32


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


def test_frozen(dtype: torch.dtype) -> None:
    """A compiled step knows no prefix: the layout has each row whole. An eager call afterwards goes on with that."""
    module = build(KINDS["GQA"], dtype=dtype, max_cache_length=40)
    pair = Pair(module, dtype, "ragged")
    pair.say(2)
    pair.both(LayerCache.freeze_layout)
    pair.check()
    pair.say(1)


def test_frozen_after_all_was_taken_back(dtype: torch.dtype) -> None:
    """Rows without a slot of their own, and without the prefix that they had."""
    module = build(KINDS["GQA"], dtype=dtype, max_cache_length=40)
    pair = Pair(module, dtype, "ragged")
    assert pair.shares
    pair.both(lambda cache: cache.truncate(0).freeze_layout())
    pair.say(2)


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


def test_a_window_that_has_not_slid_yet(dtype: torch.dtype) -> None:
    module = build(replace(KINDS["window"], window_size=20), dtype=dtype)
    pair = Pair(module, dtype, "ragged")
    assert not pair.shares
    for length in (1, 3, 20):
        pair.say(length)


class Stop(Exception):  # noqa: N818
    """Ends a transaction."""


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


def test_tensors_without_numbers() -> None:
    module = GroupQueryAttention(16, 4, 2, True, True, device="meta")
    with torch.no_grad(), tuned(min_shared_bytes=0):
        module(torch.empty(1, 9, 16, device="meta"))
        module.kv_cache.select([0, 0, 0])
        out = module(torch.empty(3, 2, 16, device="meta"))
    assert out.shape == (3, 2, 16)
    assert module.kv_cache.lengths.tolist() == [11] * 3


def test_few_bytes_are_copied() -> None:
    """Two parts of a step take longer than one, so what saves little is copied."""
    module = GroupQueryAttention(16, 4, 2, True, True)
    with torch.no_grad():
        module(torch.randn(1, 10, 16))
    module.kv_cache.select([0, 0])
    assert module.kv_cache.nbytes_used == 2 * 10 * 2 * 2 * 4 * 4
