"""Conversations that wait in a file: no memory, all figures, and any operation goes on."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.blocks.stacks import MIXED, READERS, cache_snapshots, make
from tests.cache.offloaded import RAGGED, STACKS, fed, step
from tests.conversations import assert_same, cache_snapshot
from tests.internals import buffers
from tests.oracle import Options
from tests.setups import SCHEMES, build, tokens
from tests.storages import alive_since
from transformer import GroupQueryAttention, KVCache, LayerCache, MultiHeadAttention
from transformer.cache import Lengths, policies


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("mask", [None, RAGGED], ids=["equal rows", "ragged"])
def test_a_call_brings_it_back(name: str, mask: Tensor | None, tmp_path: Path) -> None:
    """In its model or outside: bit for bit the calls of one that stayed; the file is one that `load` reads."""
    clean, _ = fed(name, mask)
    stack, cache = fed(name, mask)
    for turn in range(3):
        before = cache_snapshots(clean)
        if turn == 1:
            cache.remove(stack)
        assert cache.offload(tmp_path / "chat") is cache
        assert cache.nbytes == cache.nbytes_used == 0
        if turn == 1:
            cache.install(stack)
        loaded = make(STACKS[name])
        KVCache.load(tmp_path / "chat").install(loaded, check_weights=True)
        assert cache_snapshots(loaded) == before
        for more in range(2):
            assert torch.equal(step(stack, name, more), step(clean, name, more))
        assert cache.nbytes > 0
        assert cache_snapshots(stack) == cache_snapshots(clean)


def test_figures_leave_it_where_it_is(tmp_path: Path) -> None:
    stack, cache = fed("with sinks")
    layer = next(iter(cache.layers.values()))

    def figures() -> tuple[object, ...]:
        of_layer = layer.length, layer.cached_length, layer.row_lengths, layer.row_cached_lengths, layer.batch
        every = cache.length, cache.cached_length, cache.lengths.tolist(), cache.cached_lengths.tolist(), cache.batch
        return *of_layer, *every, cache.initialized

    before = figures()
    assert before[2] == Lengths((7, 5))
    cache.offload(tmp_path / "chat")
    (tmp_path / "chat").unlink()
    assert figures() == before
    assert repr(cache) == "KVCache(layers=3, length=7, cached_length=7, nbytes=0)"
    assert repr(layer) == "LayerCache(length=7, cached_length=5, num_kv_heads=4, head_dim=4, nbytes=0)"
    cache.remove(stack).install(stack)
    assert cache.nbytes == 0


OPERATIONS: dict[str, Callable[[KVCache], KVCache]] = {
    "truncate": lambda cache: cache.truncate(6),
    "select": lambda cache: cache.select([1, 0, 1]),
    "fork": KVCache.fork,
    "split": lambda cache: cache.split()[1],
    "join": lambda cache: KVCache.join([cache, cache.fork()]),
    "join offloaded": lambda cache: KVCache.join([cache, cache.fork().offload("other")]),
    "detach": KVCache.detach,
    "to": lambda cache: cache.to(dtype=torch.float32).to(dtype=torch.float64),
    "reserve": lambda cache: cache.reserve(100),
    "save": lambda cache: (cache.save("saved"), KVCache.load("saved"))[1],
    "save onto its own file": lambda cache: (cache.save("chat"), cache)[1],
    "deepcopy": copy.deepcopy,
    "copy": lambda cache: KVCache.join([copy.copy(cache)]),
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "again": lambda cache: cache.offload("chat"),
    "elsewhere": lambda cache: cache.offload("other"),
    "clear": KVCache.clear,
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_brings_it_back(
    name: str, operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outs = []
    for away in (False, True):
        stack, cache = fed(name)
        cache.remove(stack)
        if away:
            cache.offload("chat")
        after = OPERATIONS[operation](cache)
        after.install(stack)
        outs.append([step(stack, name, seed, length) for seed, length in ((3, 1), (4, 2))])
        after.remove(stack)
        cache.install(stack)
        outs[-1].append(step(stack, name, 5))
    assert_same(*outs, atol=1e-12)


def test_one_layer_and_a_cache_without_a_model(tmp_path: Path) -> None:
    module = GroupQueryAttention(16, 4, 2, True, True, window_size=4, num_sinks=1)
    with torch.no_grad():
        module(torch.randn(2, 9, 16))
    before = cache_snapshot(module)
    assert module.kv_cache.offload(str(tmp_path / "layer")) is module.kv_cache
    assert module.kv_cache.nbytes == 0
    assert cache_snapshot(module) == before
    assert torch.equal(LayerCache.load(tmp_path / "layer")["key"], module.kv_cache["key"])
    cache = KVCache(num_layers=2, num_kv_heads=2, head_dim=4)
    keys, values = torch.randn(2, 1, 2, 5, 4)
    cache.update(0, "self", keys, values)
    cache.update(1, "cross", keys, values)
    cache.offload(tmp_path / "whole")
    assert cache.initialized
    assert torch.equal(cache.get(1, "cross")[1], values)
    assert cache.update(0, "self", keys, values)[0].shape[2] == 10


@pytest.mark.parametrize(
    "stored", ["float16", "float8_e4m3fn", "int8", "int4", ("int8", "int4"), (None, "int8")], ids=str
)
@pytest.mark.parametrize("causal", [True, False], ids=["tokens", "tokens and a source"])
def test_records_come_back_as_they_are(stored: object, causal: bool, tmp_path: Path) -> None:
    options = Options(num_groups=2, window_size=4, num_sinks=1, causal=causal)
    clean, module = (build(options, cache_dtype=stored) for _ in range(2))
    source = tokens(2, 5, 16, seed=9)
    for turn in range(4):
        for each in (clean, module):
            with torch.no_grad():
                each(tokens(2, 3, 16, seed=turn))
                if not causal:
                    each(tokens(2, 1, 16), kv=source)
        assert cache_snapshot(module) == cache_snapshot(clean)
        module.kv_cache.offload(tmp_path / "layer")


SHAPED: dict[str, Callable[[LayerCache], LayerCache]] = {
    "compressed": lambda cache: cache.compress(5, policies.KeyNorm()),
    "repeated rows": lambda cache: cache.select([1, 0, 0, 0]),
}


@pytest.mark.parametrize("shape", SHAPED)
def test_kept_tokens_and_a_shared_prompt_come_back(shape: str, tmp_path: Path) -> None:
    clean, module = (build(Options(num_groups=2, scheme=SCHEMES["alibi"])) for _ in range(2))
    for each in (clean, module):
        with torch.no_grad():
            each(tokens(2, 300, 16))
        SHAPED[shape](each.kv_cache)
    for turn in range(3):
        module.kv_cache.offload(tmp_path / "layer")
        x = tokens(clean.kv_cache.batch, 2, 16, seed=turn)
        with torch.no_grad():
            assert_same(module(x), clean(x), atol=1e-12)
    assert module.kv_cache.truncate(301).cached_length == clean.kv_cache.truncate(301).cached_length
    assert_same(module.kv_cache["key"], clean.kv_cache["key"])


def test_each_layer_reads_its_own_tensors(tmp_path: Path) -> None:
    _, cache = fed()
    cache.offload(tmp_path / "chat")
    first, *others = cache.layers.values()
    first["key"]
    assert first.nbytes == cache.nbytes > 0
    assert [layer.nbytes for layer in others] == [0, 0]


@pytest.mark.parametrize("options", [{}, {"window_size": 3}, {"window_size": 3, "num_sinks": 2}], ids=str)
def test_the_next_token_is_appended_in_place(options: dict[str, int], tmp_path: Path) -> None:
    """It comes back into buffers with room, which no call copies once more."""
    module = build(Options(num_groups=2, **options))
    with torch.no_grad():
        for length in (4, 1):
            module(tokens(2, length, 16))
        module.kv_cache.offload(tmp_path / "layer")
        before = [tensor.data_ptr() for tensor in buffers(module.kv_cache)]
        module(tokens(2, 3, 16))
    assert [tensor.data_ptr() for tensor in buffers(module.kv_cache)] == before


def test_reserved_room_and_a_fixed_length_are_kept(tmp_path: Path) -> None:
    for options, slots in (({}, 500), ({"max_cache_length": 80}, 80)):
        module = build(Options(num_groups=2), **options)
        with torch.no_grad():
            module(tokens(2, 4, 16))
        if not options:
            module.kv_cache.reserve(496)
        module.kv_cache.offload(tmp_path / "layer")
        assert buffers(module.kv_cache)[0].shape[2] == slots
        assert module.kv_cache.contents.reserved == (0 if options else 500)


def test_a_source_is_not_projected_anew(tmp_path: Path) -> None:
    """Unless the weights have changed meanwhile, or the source has."""
    module, x, source = MultiHeadAttention(16, 4, use_kv_cache=True), torch.randn(2, 1, 16), torch.randn(2, 5, 16)
    with torch.no_grad():
        module(x, kv=source)
        module.kv_cache.offload(tmp_path / "layer")
        back = module.kv_cache.source.key
        module(x, kv=source)
        assert module.kv_cache.source.key is back
        module.kv_cache.offload(tmp_path / "layer")
        module.k_proj.weight.mul_(2.0)
        expected = copy.deepcopy(module)
        expected.kv_cache = None
        assert_same(module(x, kv=source), expected(x, kv=source), atol=1e-6)
        module.kv_cache.offload(tmp_path / "layer")
        source.add_(1.0)
        assert_same(module(x, kv=source), expected(x, kv=source), atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_its_memory_is_freed(frozen: bool, tmp_path: Path) -> None:
    """Also where other code keeps the view, the module and the caches, and of a layout for compiled steps."""
    stack, source = make(READERS), tokens(2, 3, 16, seed=9)
    for block in stack.blocks if frozen else ():
        for attention in filter(None, (block.attention, block.cross_attention)):
            attention.max_cache_length = 64
    cache = KVCache.from_model(stack)
    with torch.no_grad():
        stack(tokens(2, 5, 16), source=source)  # which makes tables of angles, too
        cache.clear()
    with alive_since() as grown, torch.no_grad():
        stack(tokens(2, 5, 16), source=source)
        layers = list(cache.layers.values())
        if frozen:
            cache.freeze_layout()
        cache.offload(tmp_path / "chat")
    assert grown.bytes == 0
    with alive_since() as grown:
        for layer in layers:
            layer["key"]
    assert grown.bytes == cache.nbytes > 0


def test_the_other_side_of_a_fork_goes_on(tmp_path: Path) -> None:
    clean, _ = fed()
    stack, cache = fed()
    fork = cache.fork()
    held = cache.nbytes
    with alive_since() as grown:
        fork.offload(tmp_path / "fork")
    assert (grown.bytes, fork.nbytes, cache.nbytes) == (0, 0, held)
    assert torch.equal(step(stack), step(clean))
    cache.offload(tmp_path / "chat")
    cache.remove(stack)
    fork.install(stack)
    twin, _ = fed()
    assert torch.equal(step(stack, seed=7), step(twin, seed=7))
    fork.remove(stack)
    cache.install(stack)
    assert torch.equal(step(stack, seed=8), step(clean, seed=8))


def test_an_empty_conversation_waits_for_no_file(tmp_path: Path) -> None:
    stack = make(MIXED)
    for cache in (KVCache.from_model(stack), KVCache(num_layers=2, num_kv_heads=2, head_dim=4)):
        cache.offload(tmp_path / "chat").offload("cpu")
        (tmp_path / "chat").unlink()
        assert cache.length == cache.nbytes == 0
        assert KVCache.from_model(stack).fork().length == 0
    step(stack)
