"""Conversations of models that ranks share: bytes of a rank, operations, files, storages, compiled steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parallel.sharing import CLOSE, OPTIONS, V, assert_same_gradients, both, decoder, mesh_of
from tests.ranks import on_ranks
from transformer.cache import KVCache
from transformer.errors import ArgumentError
from transformer.parallel import parallelize

RANKS = pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
STORAGES = [None, "bfloat16", "float8_e4m3fn", "int8", "int4", ("int8", "float16")]


@RANKS
def test_a_conversation_and_its_file_on_every_rank(ranks: int, tmp_path: Path) -> None:
    on_ranks(ranks, _conversations, str(tmp_path))


@torch.no_grad()
def _conversations(rank: int, folder: str) -> None:
    mesh = mesh_of(torch.distributed.get_world_size())
    ids = torch.randint(V, (2, 12))
    for name in ("gqa, gated, qk_norm", "window and sinks", "alibi, soft caps"):
        for stored in STORAGES if name == "gqa, gated, qk_norm" else STORAGES[:1]:
            whole, shared = (each.eval() for each in both(lambda name=name: decoder(**OPTIONS[name]), mesh))
            path = Path(folder) / f"{rank}.safetensors"
            results = [_talked(each.enable_cache(cache_dtype=stored), ids, path) for each in (whole, shared)]
            for one, other in zip(*results, strict=True):
                # What is rounded to few bits may round to the next number.
                torch.testing.assert_close(other, one, atol=CLOSE * 10 if stored is None else 0.05, rtol=0)
            assert whole.kv_cache.nbytes == mesh.size() * shared.kv_cache.nbytes, (name, stored)
            assert whole.kv_cache.nbytes_used == mesh.size() * shared.kv_cache.nbytes_used


def _talked(model: torch.nn.Module, ids: Tensor, path: Path) -> list[Tensor]:
    """Logits after each operation on the conversation."""
    logits = [model(ids[:, :4]), model(ids[:, 4:5])]
    fork = model.kv_cache.fork()
    logits.append(model(ids[:, 5:7]))
    model.kv_cache.truncate(5)
    logits.append(model(ids[:, 7:8]))
    model.kv_cache.select([1, 0, 1])
    logits.append(model(ids[[1, 0, 1], 8:9]))
    model.kv_cache.remove(model)
    fork.install(model)
    logits.append(model(ids[:, 9:10]))
    model.kv_cache.save(path)
    model.kv_cache = None
    KVCache.load(path).install(model)
    logits.append(model(ids[:, 10:11]))
    return logits


def test_a_file_of_another_rank_is_refused(tmp_path: Path) -> None:
    on_ranks(2, _files, str(tmp_path))


@torch.no_grad()
def _files(rank: int, folder: str) -> None:
    mesh = mesh_of(2)
    whole, shared = (each.eval().enable_cache() for each in both(lambda: decoder(), mesh))
    ids = torch.randint(V, (1, 4))
    for model, name in ((shared, f"{rank}"), (whole, f"whole{rank}")):
        model(ids)
        model.kv_cache.save(Path(folder) / f"{name}.safetensors")
        model.kv_cache = None
    torch.distributed.barrier()
    for other in (f"{1 - rank}", f"whole{rank}"):
        cache = KVCache.load(Path(folder) / f"{other}.safetensors")
        with pytest.raises(ArgumentError, match="share="):
            cache.install(shared)
    own = KVCache.load(Path(folder) / f"{rank}.safetensors")
    with pytest.raises(ArgumentError, match="share="):
        own.install(whole)
    layer = next(iter(KVCache.load(Path(folder) / f"{1 - rank}.safetensors").layers.values()))
    with pytest.raises(ArgumentError, match=r"share \(rank, ranks\)"):
        shared.decoder.blocks[0].attention.kv_cache = layer
    assert shared.kv_cache.length == 0
    own.install(shared, check_weights=True)
    assert shared.kv_cache.length == 4
    own.remove(shared)
    shared.decoder.blocks[0].attention.q_proj.weight.mul_(2.0)
    with pytest.raises(ArgumentError, match=r"q_proj\.weight' has other numbers"):
        KVCache.load(Path(folder) / f"{rank}.safetensors").install(shared, check_weights=True)


@pytest.mark.slow
def test_a_compiled_step_over_a_frozen_layout() -> None:
    on_ranks(2, _compiled)


@torch.no_grad()
def _compiled(_rank: int) -> None:
    whole, shared = (each.eval().enable_cache(max_length=32) for each in both(lambda: decoder(), mesh_of(2)))
    ids = torch.randint(V, (2, 12))
    for model in (whole, shared):
        model(ids[:, :5])
    shared.kv_cache.freeze_layout()
    step = torch.compile(shared, fullgraph=True, backend="aot_eager")
    for place in range(5, 12):
        expected, found = whole(ids[:, place : place + 1]), step(ids[:, place : place + 1])
        torch.testing.assert_close(found, expected, atol=CLOSE * 2, rtol=0)


@pytest.mark.slow
def test_a_compiled_training_step() -> None:
    on_ranks(2, _trained)


def _trained(_rank: int) -> None:
    whole, shared = both(lambda: decoder(**OPTIONS["gqa, gated, qk_norm"]), mesh_of(2))
    ids = torch.randint(V, (2, 12))
    compiled = torch.compile(shared, backend="aot_eager")
    whole(ids).square().mean().backward()
    compiled(ids).square().mean().backward()
    assert_same_gradients(whole, shared)


def test_one_rank_is_a_model_like_any() -> None:
    on_ranks(1, _alone)


@torch.no_grad()
def _alone(_rank: int) -> None:
    whole = decoder(**OPTIONS["gqa, gated, qk_norm"]).eval()
    ids = torch.randint(V, (2, 5))
    expected = whole(ids)
    torch.testing.assert_close(parallelize(whole, mesh_of(1))(ids), expected, atol=CLOSE, rtol=0)
