"""Caches in fewer bits: every mode and operation over every codec, against plain loops and against one shot."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same, cache_snapshot, numbers, run_chunks
from tests.oracle import Conversation, Options
from tests.setups import SCHEMES, build, fill, padding, tokens
from transformer import DecoderOnlyTransformer, GroupQueryAttention, KVCache, LayerCache, cache_bytes
from transformer.codecs import CODECS, Coding
from transformer.errors import (
    ArgumentError,
    CacheFullError,
    CacheStateError,
    ConfigurationError,
    DtypeError,
    FileFormatError,
)

KINDS = ("float16", "bfloat16", "float8_e4m3fn", "int8", "int4")
PAIRS = [(kind, kind) for kind in KINDS] + [("int8", "int4"), (None, "int8"), ("bfloat16", None)]


def ids(pair: tuple[str | None, str | None]) -> str:
    return "-".join(map(str, pair))


EVERY = pytest.mark.parametrize("stored", PAIRS, ids=ids)
MEMORIES = ({}, {"window_size": 5}, {"window_size": 4, "num_sinks": 2})
MODES = pytest.mark.parametrize(
    ("groups", "window", "sinks", "scheme"),
    [
        (4, None, 0, "rotary halves"),
        (2, 5, 0, "rotary halves"),
        (1, 3, 2, "alibi"),
        (2, 4, 1, "none"),
        (2, 3, 0, "t5 causal"),
    ],
)


def options(stored: tuple, groups: int = 2, window: int | None = None, sinks: int = 0, scheme: str = "none") -> Options:
    return Options(num_groups=groups, window_size=window, num_sinks=sinks, scheme=SCHEMES[scheme], stored=stored)


def exact(stored: object, seed: int = 0, **more: object) -> GroupQueryAttention:
    """A module whose keys and values are whole numbers: the same to the bit, however a sequence is cut."""
    module = GroupQueryAttention(16, 4, 2, True, True, bias=False, cache_dtype=stored, **more)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randint(-3, 4, parameter.shape, generator=random)
            parameter.copy_(drawn.float() if "out" not in name else drawn / 64)
    return module


def whole(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.slow
@EVERY
@MODES
def test_calls_are_those_of_plain_loops(
    stored: tuple, groups: int, window: int | None, sinks: int, scheme: str
) -> None:
    """Chunks, rows of different lengths, both modes: a query meets the numbers that were stored."""
    own = options(stored, groups, window, sinks, scheme)
    module, oracle = build(own), Conversation(build(own), own)
    with torch.no_grad():
        for number, (length, mask, mode) in enumerate(
            [
                (5, padding([(0, 5), (2, 2)], 5), None),
                (1, None, None),
                (3, padding([(1, 2), (0, 3)], 3), None),
                (2, None, True),
            ]
        ):
            x = tokens(2, length, 16, seed=number)
            out = module(x, None, mode, attention_mask=mask)
            assert_same(out, oracle.call(x, mask, mode)[0], atol=1e-9)
            assert_same(module.kv_cache["value"], oracle.held_values(), atol=1e-12)


@EVERY
@pytest.mark.parametrize(
    "memory", [{}, {"window_size": 5}, {"window_size": 4, "num_sinks": 2}, {"max_cache_length": 40}]
)
def test_any_split_is_one_shot(stored: tuple, memory: dict) -> None:
    """To the bit in what is stored: no token is rounded again, whatever moves it."""
    x, ends = whole(2, 24, 16), []
    for split in ([24], [1] * 24, [7, 1, 1, 15], [3, 21]):
        module = exact(stored, **memory)
        with torch.no_grad():
            out = run_chunks(module, x, split)
        ends.append((out, module.kv_cache["key"], module.kv_cache["value"]))
    for out, key, value in ends[1:]:
        torch.testing.assert_close(out, ends[0][0], atol=2e-5, rtol=1e-5)
        assert torch.equal(key, ends[0][1])
        assert torch.equal(value, ends[0][2])


@EVERY
def test_what_is_shown_is_what_is_stored(stored: tuple) -> None:
    module, x = exact(stored), whole(2, 9, 16)
    with torch.no_grad():
        module(x)
        given = module.key_value(x)
    coding = Coding.of(stored, 4, torch.float32)
    expected = coding.decoded(*coding.encoded(*given))
    assert torch.equal(module.kv_cache["key"], expected[0])
    assert torch.equal(module.kv_cache["value"], expected[1])
    assert module.kv_cache["key"].dtype is torch.float32


def other_half(module: nn.Module, x: Tensor, change: Callable[[LayerCache], LayerCache]) -> tuple[Tensor, object]:
    """What comes of a conversation that is changed in the middle, and what is then cached."""
    with torch.no_grad():
        module(x[:, :8])
        module.kv_cache = change(module.kv_cache)
        return module(x[:, 8:]), cache_snapshot(module)


def saved(cache: LayerCache, folder: Path) -> LayerCache:
    cache.save(folder / "one.safetensors")
    return LayerCache.load(folder / "one.safetensors")


@EVERY
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(
    "change",
    [
        lambda cache, _: cache.fork(),
        lambda cache, _: copy.deepcopy(cache),
        lambda cache, _: pickle.loads(pickle.dumps(cache)),
        saved,
        lambda cache, _: cache.select([0, 1]),
        lambda cache, _: LayerCache.join([cache.fork().select([0]), cache.fork().select([1])]),
        lambda cache, _: cache.detach().to("cpu").reserve(300),
        lambda cache, _: cache.to(dtype=torch.bfloat16).to(dtype=torch.float32),
    ],
    ids=["fork", "deepcopy", "pickle", "file", "select", "join", "detach", "cast and back"],
)
def test_an_operation_in_between_changes_nothing(stored: tuple, memory: dict, change: Callable, tmp_path: Path) -> None:
    x = whole(2, 12, 16)
    expected, held = other_half(exact(stored, **memory), x, lambda cache: cache)
    if None in stored and "bfloat16" in change.__code__.co_names:
        return  # A cast rounds what is not stored by a codec.
    out, then = other_half(exact(stored, **memory), x, lambda cache: change(cache, tmp_path))
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    assert then == held


@EVERY
def test_truncation_and_another_ending(stored: tuple) -> None:
    x, other = whole(2, 12, 16), whole(2, 4, 16, seed=1)
    module, fresh = exact(stored, window_size=6, num_sinks=1), exact(stored, window_size=6, num_sinks=1)
    with torch.no_grad():
        module(x[:, :8])
        module(x[:, 8:])
        module.kv_cache.truncate(8)
        out = module(other)
        fresh(x[:, :8])
        expected = fresh(other)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    assert cache_snapshot(module) == cache_snapshot(fresh)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (5, 2)])
def test_compiled_steps(stored: tuple, window: int | None, sinks: int) -> None:
    """Over a frozen layout: one graph, the numbers of eager calls, and eager calls go on after it."""
    own = options(stored, 2, window, sinks, "rotary halves")
    module, eager = build(own, max_cache_length=40).eval(), build(own).eval()
    x = tokens(2, 20, 16)
    with torch.no_grad():
        expected = run_chunks(eager, x, [8, *[1] * 8, 4])
        outs = [module(x[:, :8])]
        module.kv_cache.freeze_layout()
        torch._dynamo.reset()
        step = torch.compile(module, fullgraph=True, backend="aot_eager")
        outs += [step(x[:, i : i + 1]) for i in range(8, 16)]
        outs.append(module(x[:, 16:]))
    assert_same(torch.cat(outs, 1), expected, atol=1e-9)


@pytest.mark.parametrize("stored", KINDS)
def test_a_source_is_kept_in_fewer_bits(stored: str) -> None:
    attention = GroupQueryAttention(16, 4, 2, use_kv_cache=True, head_dim=64, cache_dtype=stored).eval()
    plain = copy.deepcopy(attention)
    plain.cache_dtype = None
    x, source = tokens(2, 3, 16, dtype=torch.float32), tokens(2, 7, 16, seed=1, dtype=torch.float32)
    mask = padding([(0, 7), (0, 4)], 7)
    with torch.no_grad():
        for kv_mask in (None, mask):
            outs = [attention(x, source, kv_mask=kv_mask) for _ in range(2)]
            assert torch.equal(*outs)
            torch.testing.assert_close(outs[0], plain(x, source, kv_mask=kv_mask), atol=0.1, rtol=0)
        assert attention.kv_cache.nbytes < plain.kv_cache.nbytes
        assert attention.kv_cache["key"].shape == plain.kv_cache["key"].shape
        loaded = copy.deepcopy(attention.kv_cache).select([1, 0])
        assert torch.equal(loaded["key"], attention.kv_cache["key"].flip(0))
        joint = LayerCache.join([attention.kv_cache, loaded])
        assert joint["value"].shape[0] == 4


# --- what is refused ------------------------------------------------------------------------------------------------


def test_recorded_calls_are_refused_before_anything_changes() -> None:
    module, x = exact("int8"), whole(2, 3, 16)
    with torch.no_grad():
        module(x)
    before = cache_snapshot(module)
    with pytest.raises(CacheStateError, match="cache_dtype: expected a call in which no gradients are recorded"):
        module(x)
    assert cache_snapshot(module) == before
    module.requires_grad_(False)
    module(x)
    assert module.kv_cache.length == 6


@pytest.mark.parametrize("given", ["int3", torch.int32, ("int8",), 8])
def test_options_are_checked(given: object) -> None:
    with pytest.raises(ConfigurationError, match="cache_dtype: expected None, one of"):
        GroupQueryAttention(16, 4, 2, cache_dtype=given)
    with pytest.raises(ArgumentError, match="cache_dtype: expected None, one of"):
        KVCache(num_layers=1, num_kv_heads=2, head_dim=4, cache_dtype=given)


def test_errors_are_those_of_any_cache() -> None:
    module, x = exact("int8", max_cache_length=5), whole(2, 3, 16)
    with torch.no_grad():
        module(x)
        before = cache_snapshot(module)
        with pytest.raises(CacheFullError):
            module(x)
        module.double()
        module.kv_cache.to(dtype=torch.float32)
        with pytest.raises(DtypeError, match=r"holds torch\.float32"):
            module(x.double())
    assert cache_snapshot(module) == before


def test_conversations_of_different_storage_do_not_join() -> None:
    caches = []
    for stored in ("int8", "int4"):
        module = exact(stored)
        with torch.no_grad():
            module(whole(1, 3, 16))
        caches.append(module.kv_cache)
    differs = r"first in cache_dtype \(\('int4', 'int4'\), there \('int8', 'int8'\)\)$"
    with pytest.raises(ArgumentError, match=differs):
        LayerCache.join(caches)


@pytest.mark.parametrize(
    ("stored", "names"), [("int8", ("int8", "int8")), ((None, "int4"), (None, "int4")), (None, None)]
)
def test_how_a_cache_is_stored_is_shown(stored: object, names: object) -> None:
    module = exact(stored)
    with torch.no_grad():
        module(whole(1, 3, 16))
    layer, whole_cache = module.kv_cache, KVCache.from_model(module)
    assert layer.cache_dtype == names
    for cache in (layer, whole_cache):
        assert ("cache_dtype" in repr(cache)) == (names is not None)
        assert names is None or f", cache_dtype={names}, nbytes=" in repr(cache)


def test_a_file_with_records_that_do_not_fit_is_refused(tmp_path: Path) -> None:
    module = exact("int8")
    with torch.no_grad():
        module(whole(1, 3, 16))
    cache = module.kv_cache
    cache.spec = replace(cache.spec, cache_dtype=("int4", "int4"))
    with pytest.raises(CacheStateError, match="as int4 is stored"):
        cache.save(tmp_path / "one.safetensors")
    assert not list(tmp_path.iterdir())
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(FileFormatError):
        LayerCache.load(tmp_path / "other.safetensors")


# --- whole models, and caches without one ----------------------------------------------------------------------------


def model() -> DecoderOnlyTransformer:
    shape = {"d_model": 32, "num_heads": 4, "d_ff": 32, "num_layers": 2}
    built = DecoderOnlyTransformer(40, **shape, attention="gqa", num_groups=2).eval()
    fill(built, 0)
    return built


@pytest.mark.parametrize("stored", [None, *KINDS])
def test_a_model_and_its_bytes(stored: str | None) -> None:
    built, ids = model(), torch.arange(20).view(2, 10)
    planned = cache_bytes(built.enable_cache(10), 2, 10, cache_dtype=stored)
    built.enable_cache(10, cache_dtype=stored)
    with torch.no_grad():
        built(ids)
    assert built.kv_cache.nbytes == built.kv_cache.nbytes_used == planned
    assert cache_bytes(built, 2, 10) == planned
    vector = 8 * 4 if stored is None else CODECS[stored].record_bytes(8)
    assert planned == 2 * 2 * 10 * 2 * 2 * vector
    built.disable_cache().enable_cache(10)
    assert cache_bytes(built, 2, 10) == 2 * 2 * 10 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("stored", KINDS)
def test_generation_and_a_conversation_that_goes_on(stored: str, tmp_path: Path) -> None:
    """The file of a conversation fits a model that stores its own otherwise: tokens go on as those before."""
    ids = torch.arange(12).view(2, 6)
    built = model().enable_cache(cache_dtype=stored)
    longer = built.generate(ids, max_new_tokens=8)
    first = built.clear_cache().generate(ids, max_new_tokens=4)
    assert torch.equal(longer[:, : first.shape[1]], first)
    built.kv_cache.save(tmp_path / "it.safetensors")
    again = model().enable_cache()
    again.kv_cache = KVCache.load(tmp_path / "it.safetensors")
    assert again.kv_cache.nbytes < cache_bytes(again, 2, again.kv_cache.length)
    with torch.no_grad():
        assert torch.equal(again(longer[:, 9:10]), built(longer[:, 9:10]))


@pytest.mark.parametrize("stored", KINDS)
def test_a_cache_that_the_caller_fills(stored: str) -> None:
    cache = KVCache(num_layers=2, num_kv_heads=2, head_dim=8, cache_dtype=stored)
    key, value = tokens(2, 2, 5, 8, dtype=torch.float32), tokens(2, 2, 5, 8, seed=1, dtype=torch.float32)
    expected = Coding.of((stored, stored), 8, torch.float32)
    expected = expected.decoded(*expected.encoded(key, value))
    for layer in range(2):
        shown = cache.update(layer, "self", key[:, :, :3], value[:, :, :3])
        assert shown[0].shape == (2, 2, 3, 8)
        shown = cache.update(layer, "self", key[:, :, 3:], value[:, :, 3:])
        assert numbers(shown[0]) == numbers(expected[0])
        source = cache.update(layer, "cross", key, value)
        assert numbers(source[1]) == numbers(expected[1])
    with pytest.raises(DtypeError, match=r"expected torch\.float32, as the cache"):
        cache.update(0, "self", key.double(), value.double())
