"""`compress`: attention over exactly the kept tokens at their true positions, in plain loops, after any operation."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from tests.blocks.stacks import Layer, make
from tests.cache.subjects import first_values
from tests.conversations import assert_same, cache_snapshot
from tests.oracle import Options
from tests.oracle_operations import EditableConversation, first_value
from tests.setups import SCHEMES, build, padding, tokens
from tests.storages import alive_since
from transformer import KVCache, LayerCache
from transformer.cache.policies import AccumulatedAttention, KeyNorm, LastQueries, SinksAndNewest
from transformer.errors import ArgumentError, AttentionError, CacheStateError, DtypeError, ShapeError
from transformer.kernels import tuned

KINDS = {"MHA": 4, "GQA": 2, "MQA": 1}
WINDOWS = {"expanding": {}, "window": {"window_size": 6}, "sinks": {"window_size": 6, "num_sinks": 2}}
RAGGED = padding([(0, 9), (2, 5), (6, 3)], 9)


class Both:
    """A module and its oracle, which are given the same calls and operations."""

    def __init__(self, options: Options, kind: str = "GQA", **more: object) -> None:
        self.module = build(options, kind, **more)
        self.oracle, self.count = EditableConversation(self.module, options), 0

    @property
    def cache(self) -> LayerCache:
        return self.module.kv_cache

    @torch.no_grad()
    def say(self, length: int, mask: Tensor | None = None, mode: bool | None = None) -> None:
        """One call, whose outputs and values agree."""
        self.count += 1
        x = tokens(len(self.oracle.said) or 3, length, 16, seed=self.count)
        expected, _ = self.oracle.call(x, mask, mode)
        assert_same(self.module(x, None, mode, attention_mask=mask), expected)
        self.holds_the_same()

    def compress(self, keep: int) -> None:
        lengths = self.cache.lengths
        assert self.cache.compress(keep, first_values) is self.cache
        self.oracle = self.oracle.compressed(keep, first_value)
        assert self.cache.lengths.tolist() == lengths.tolist()
        assert self.cache.cached_length <= keep
        self.holds_the_same()

    def becomes(self, cache: LayerCache, oracle: EditableConversation) -> None:
        self.module.kv_cache, self.oracle = cache, oracle
        self.holds_the_same()

    def holds_the_same(self) -> None:
        assert self.cache.cached_lengths.tolist() == self.oracle.cached_lengths
        assert_same(self.cache["value"], self.oracle.held_values())


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("scheme", ["none", "rotary halves", "alibi", "t5 causal"])
@pytest.mark.parametrize("kind", KINDS)
def test_calls_and_operations_after_a_compression(kind: str, scheme: str, window: str) -> None:
    """Rows of which some stay whole, chunks in every mode, a second compression, and each operation in between."""
    both = Both(Options(num_groups=KINDS[kind], scheme=SCHEMES[scheme], **WINDOWS[window]), kind)
    both.say(9, RAGGED, mode=True)
    both.compress(4)
    for length, mode in ((1, None), (3, True), (2, None), (8, None), (1, False)):
        both.say(length, mode=mode)
    both.say(3, padding([(0, 3), (1, 0), (1, 2)], 3), mode=True)
    both.compress(5)
    aside, oracle = both.cache.fork(), both.oracle.forked()
    both.say(2, mode=True)
    both.becomes(both.cache.truncate(both.cache.length - 2), both.oracle.truncated(both.cache.length))
    both.say(1)
    both.becomes(LayerCache.join([both.cache, aside]), both.oracle.joined(oracle))
    both.say(2)
    rows = [4, 0, 0, 5]
    both.becomes(both.cache.select(rows), both.oracle.selected(rows))
    both.say(1)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("scheme", ["rotary halves", "alibi", "t5 causal"])
@pytest.mark.parametrize("stored", [(None, None), ("int8", "int8")], ids=["numbers", "records"])
@torch.no_grad()
def test_equal_rows_and_long_ones_in_float32(stored: tuple, scheme: str, window: str) -> None:
    """Where kernels take positions instead of masks, or records, and where padded rows attend one by one."""
    options = Options(num_groups=2, scheme=SCHEMES[scheme], stored=stored, **WINDOWS[window])
    module = build(options, dtype=torch.float32)
    oracle = EditableConversation(module, options)

    def say(length: int, seed: int, mode: bool | None, mask: Tensor | None = None) -> None:
        x = tokens(2, length, 16, seed=seed, dtype=torch.float32)
        assert_same(module(x, None, mode, attention_mask=mask).double(), oracle.call(x, mask, mode)[0], atol=2e-5)

    say(12, 1, True)
    module.kv_cache.compress(5, first_values)
    oracle = oracle.compressed(5, first_value)
    for seed, (length, mode) in enumerate(((1, None), (1, True), (2, None), (1, False)), 2):
        say(length, seed, mode)
    with tuned(min_row_tokens=1):
        say(6, 9, None, padding([(0, 6), (2, 4)], 6))


@pytest.mark.parametrize("scheme", ["rotary halves", "alibi"])
@pytest.mark.parametrize("window", WINDOWS)
def test_weights_and_a_bias_have_the_kept_tokens_first(scheme: str, window: str) -> None:
    """Of each head its own ones, in order; then those of the call."""
    both = Both(Options(num_groups=2, scheme=SCHEMES[scheme], **WINDOWS[window]))
    both.say(9, RAGGED, mode=True)
    both.compress(4)
    x, mask, bias = tokens(3, 3, 16, seed=50), padding([(0, 3), (1, 2), (0, 1)], 3), tokens(3, 4, 3, 7, seed=51)
    expected = both.oracle.call(x, mask, None, bias)
    with torch.no_grad():
        assert_same(both.module(x, attention_mask=mask, attn_bias=bias, return_weights=True), expected)


def test_without_causal_order() -> None:
    both = Both(Options(num_groups=2, causal=False, scheme=SCHEMES["alibi"], window_size=6))
    both.say(9, RAGGED, mode=True)
    both.compress(4)
    for mode in (True, None, None):
        both.say(2, mode=mode)


def test_it_reaches_back_to_the_compression_and_not_before() -> None:
    both = Both(Options(num_groups=2, scheme=SCHEMES["alibi"]))
    both.say(9, RAGGED)
    both.compress(4)
    both.say(5)
    with pytest.raises(CacheStateError, match="length: expected at least 9"):
        both.cache.truncate(8)
    both.becomes(both.cache.truncate(11), both.oracle.truncated(11))
    both.becomes(both.cache.truncate(9), both.oracle.truncated(9))
    both.say(2)


def detours(cache: LayerCache, folder: Path) -> dict[str, LayerCache]:
    cache.save(folder / "file")
    return {
        "file": LayerCache.load(folder / "file"),
        "pickle": pickle.loads(pickle.dumps(cache)),
        "deepcopy": copy.deepcopy(cache),
        "to": cache.fork().to(dtype=torch.float64),
        "detach": cache.fork().detach(),
        "transaction": cache.fork(),
    }


@pytest.mark.parametrize("window", WINDOWS)
def test_copies_and_files(window: str, tmp_path: Path) -> None:
    both = Both(Options(num_groups=2, scheme=SCHEMES["alibi"], **WINDOWS[window]))
    both.say(9, RAGGED, mode=True)
    both.compress(4)
    for path, cache in detours(both.cache, tmp_path).items():
        again = Both(both.oracle.options)
        again.becomes(cache, both.oracle.forked())
        again.count = 20
        for mode in (True, None):
            again.say(2, mode=mode)
        assert again.cache.length == 13, path


def test_a_file_without_a_compression_is_what_it_was(tmp_path: Path) -> None:
    both = Both(Options(num_groups=2))
    both.say(5)
    both.cache.compress(5, first_values).save(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        assert set(file.keys()) == {"/self.key", "/self.value"}
        numbers = json.loads(file.metadata()["layers"])[""]["numbers"]
    assert numbers == {"stored": [0], "start": [0], "length": [5], "window": None}


def test_a_whole_model() -> None:
    """All layers at once, each by its own scores."""
    stack = make([Layer(), Layer(groups=1)], "rotary halves")
    with torch.no_grad():
        stack(tokens(2, 9, 16))
        cache = KVCache.from_model(stack)
        assert cache.compress(4, first_values) is cache
        assert (cache.length, cache.cached_length) == (9, 4)
        assert [layer.cached_length for layer in cache.parts()] == [4, 4]
        stack(tokens(2, 2, 16))
    assert (cache.length, cache.cached_length) == (11, 6)


def test_gradients_reach_the_kept_tokens_alone() -> None:
    module, x = build(Options(num_groups=2)), tokens(1, 6, 16).requires_grad_()
    module(x)
    module.kv_cache.compress(2, SinksAndNewest(sinks=1))
    module(tokens(1, 1, 16, seed=1)).sum().backward()
    assert (x.grad.abs().sum(-1)[0] > 0).tolist() == [True, False, False, False, False, True]


def test_what_is_allocated() -> None:
    module, x = build(Options(num_groups=2)), tokens(2, 900, 16)
    with torch.no_grad(), alive_since() as grown:
        module(x)
        module.kv_cache.compress(10, first_values)
    assert grown.bytes == module.kv_cache.nbytes < 2 * 2 * 2 * 900 * 4 * 8
    assert module.kv_cache.nbytes_used == 2 * 2 * 2 * 10 * 4 * 8


@pytest.mark.parametrize("names", ["int8", ("float16", "int4"), (None, "int8")])
def test_stored_records_are_kept_as_they_are(names: object) -> None:
    """The policy reads what attention reads, and nothing is rounded twice."""
    module, x, seen = build(Options(num_groups=2), cache_dtype=names), tokens(2, 9, 16), []

    def newest(keys: Tensor, values: Tensor, *, positions: Tensor) -> Tensor:
        seen.append((keys, values))
        return positions.double()

    with torch.no_grad():
        module(x)
        before = module.kv_cache["key"].clone(), module.kv_cache["value"].clone()
        module.kv_cache.compress(4, newest)
    assert_same(seen[0], before, atol=0)
    assert_same((module.kv_cache["key"], module.kv_cache["value"]), tuple(each[:, :, 5:] for each in before), atol=0)
    assert module.kv_cache.nbytes < 2**15


# --- the choice -----------------------------------------------------------------------------------------------------


def filled(length: int = 6, **options: object) -> nn.Module:
    module = build(Options(num_groups=2, **options))
    with torch.no_grad():
        module(tokens(2, length, 16), attention_mask=padding([(0, length), (0, length - 1)], length))
    return module


def chosen(scores: list[float], keep: int = 3) -> list[int]:
    """The tokens of the first row that stay."""
    module = filled()
    values = module.kv_cache["value"].clone()
    module.kv_cache.compress(keep, lambda keys, *_, **__: torch.tensor([[scores]]).float() + 0 * keys[..., 0])
    kept = module.kv_cache["value"][0, 0]
    return [next(i for i in range(6) if torch.equal(values[0, 0, i], token)) for token in kept]


def test_ties_go_to_the_newest_and_not_a_number_is_the_lowest() -> None:
    nan, inf = float("nan"), float("inf")
    assert chosen([1, 1, 1, 1, 1, 1]) == [3, 4, 5]
    assert chosen([3, 1, 1, 2, 1, 0]) == [0, 3, 4]
    assert chosen([nan, 1, nan, 1, -5, nan]) == [1, 3, 4]
    assert chosen([nan, -inf, nan, nan, nan, -inf]) == [3, 4, 5]
    assert chosen([inf, nan, inf, nan, nan, -1], 4) == [0, 2, 4, 5]


@torch.no_grad()
def test_a_token_of_nan_that_is_dropped_spoils_nothing_any_more() -> None:
    """Not even where rows then differ, whose columns after the last token are read with weight 0."""
    module, x = build(Options(num_groups=2)), tokens(2, 6, 16)
    x[0, 0] = float("nan")
    module(x)
    module.kv_cache.compress(4, first_values)
    assert bool(module(tokens(2, 3, 16, seed=1), attention_mask=padding([(0, 1), (0, 3)], 3)).isfinite().all())


def test_columns_after_a_shorter_row_never_win() -> None:
    """Even against tokens of the lowest scores: the policy gets positions below zero there."""
    module = filled()
    values = module.kv_cache["value"].clone()

    def last(keys: Tensor, _values: Tensor, *, positions: Tensor) -> Tensor:
        assert positions[1, 0].tolist() == [0, 1, 2, 3, 4, -1]
        return torch.full(keys.shape[:3], float("nan")).masked_fill(positions < 0, float("inf"))

    module.kv_cache.compress(2, last)
    assert_same(module.kv_cache["value"][1], values[1, :, 3:5], atol=0)


def test_sinks_stay_and_are_counted_once() -> None:
    module = filled(8, window_size=4, num_sinks=2)
    cache = module.kv_cache
    sinks = cache["key"][:, :, :2].clone()
    cache.compress(3, lambda keys, *_, **__: torch.full(keys.shape[:3], float("inf")))
    assert cache.cached_length == 3
    assert_same(cache["key"][:, :, :2], sinks, atol=0)
    for keep in (2, 1):
        with pytest.raises(ArgumentError, match="keep: expected a whole number of at least 3"):
            cache.compress(keep, KeyNorm())


WRONG: dict[str, tuple[object, object, type[Exception]]] = {
    "keep of 0": (0, KeyNorm(), ArgumentError),
    "keep of True": (True, KeyNorm(), ArgumentError),
    "keep of 2.0": (2.0, KeyNorm(), ArgumentError),
    "a name": (2, "KeyNorm", ArgumentError),
    "a class": (2, KeyNorm, ArgumentError),
    "no tensor": (2, lambda *_, **__: [1.0], ArgumentError),
    "scores of another shape": (2, lambda keys, *_, **__: keys, ShapeError),
    "scores of whole numbers": (2, lambda keys, *_, **__: keys[..., 0].long(), DtypeError),
    "queries that were not kept": (3, LastQueries(2), CacheStateError),
    "what the policy always keeps": (3, SinksAndNewest(3), ArgumentError),
    "newest that are all": (3, AccumulatedAttention(4), ArgumentError),
    "weights that were not kept": (9, AccumulatedAttention(2), CacheStateError),
    "its own exception": (2, lambda *_, **__: 1 // 0, ZeroDivisionError),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused_changes_nothing(name: str) -> None:
    keep, by, kind = WRONG[name]
    module = filled()
    before = cache_snapshot(module)
    with pytest.raises(kind) as raised:
        module.kv_cache.compress(keep, by)
    if issubclass(kind, AttentionError):
        assert str(raised.value).startswith(("keep: ", "by: ", "kv_cache: "))
    assert cache_snapshot(module) == before


def test_a_model_of_which_one_layer_refuses_stays_as_it_was() -> None:
    calls: list[int] = []

    def second(keys: Tensor, *_: Tensor, **__: Tensor) -> Tensor:
        calls.append(1)
        return keys[..., 0] if len(calls) == 1 else keys

    cache = KVCache(num_layers=2, num_kv_heads=2, head_dim=4)
    for layer in range(2):
        cache.update(layer, "self", torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4))
    with pytest.raises(ShapeError):
        cache.compress(2, second)
    assert [part.cached_length for part in cache.parts()] == [5, 5]
    assert cache.compress(2, KeyNorm()).get(1, "self")[0].shape[2] == 2


def test_an_empty_cache_and_a_source_are_not_touched() -> None:
    module = build(Options(num_groups=4, causal=False), "MHA")
    assert module.new_cache().compress(2, KeyNorm()).length == 0
    with torch.no_grad():
        module(tokens(2, 2, 16), tokens(2, 7, 16))
    assert module.kv_cache.compress(2, KeyNorm())["key"].shape[2] == 7


@pytest.mark.parametrize("whole", [False, True])
def test_a_layout_for_compiled_steps_is_refused_afterwards(whole: bool) -> None:
    cache = KVCache(num_layers=1, num_kv_heads=2, head_dim=4, max_length=9)
    cache.update(0, "self", torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4))
    layer = cache.parts()[0]
    cache.freeze_layout().compress(2, SinksAndNewest(1))
    with pytest.raises(CacheStateError, match="freeze_layout"):
        (cache if whole else layer).freeze_layout()
    assert layer.cached_length == 2


def test_once_a_window_has_evicted_all_of_it_nothing_is_left_of_a_compression() -> None:
    both = Both(Options(num_groups=2, scheme=SCHEMES["alibi"], window_size=3))
    both.say(9, RAGGED, mode=True)
    both.compress(4)
    while both.cache.length < 90:
        both.say(3)
    assert both.cache.contents.state.kept is None
