"""Conversations of sequences that ranks share: logits, tokens and operations are those of one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.parallel.sequences import KINDS, distance, ids_of, model_of
from tests.parallel.sharing import assert_equal_on_ranks, mesh_of
from tests.ranks import on_ranks
from transformer.errors import ArgumentError, CacheStateError
from transformer.parallel import share_sequence

CALLS = (256, 1, 1, 70, 1, 40, 60, 1, 1)
"""A prompt that ranks share, tokens one by one, and turns of several tokens that each rank is given."""


def run_conversation(_: int, ranks: int) -> None:
    mesh, length = mesh_of(ranks), sum(CALLS)
    for kind in KINDS:
        for dtype, most in ((torch.float64, 1e-13), (torch.float32, 5e-7)):
            model, ids = model_of(kind, dtype), ids_of(length)
            with torch.no_grad():
                whole = model(ids)
                model.enable_cache()
                with share_sequence(model, mesh):
                    outs = [model(part) for part in ids.split(CALLS, 1)]
            logits = torch.cat(outs, 1)
            assert distance(logits, whole) <= most * whole.abs().max(), kind
            assert_equal_on_ranks(logits)
            assert model.kv_cache.length == length
            if "window_size" not in KINDS[kind]:
                # Chunks are equal, and blocks of 64 come in turns.
                assert abs(model.kv_cache.cached_length - length / ranks) <= 64
                assert model.kv_cache.nbytes_used <= (length / ranks + 64) * 2 * 2 * 2 * 32 * dtype.itemsize


GENERATIONS: Mapping[str, tuple[int, dict[str, Any]]] = {
    "greedy": (300, {}),
    "prompt in chunks": (300, {"prefill_chunk_size": 100}),
    "prompt on one rank": (5, {}),
    "one token": (300, {"max_new_tokens": 1, "use_cache": True}),
    "beams": (300, {"num_beams": 3}),
    "samples": (300, {"num_return_sequences": 3, "temperature": 1.0}),
}


def generate(_: int, ranks: int) -> None:
    mesh = mesh_of(ranks)
    for kind in ("full", "ALiBi", "mixed", "window and sinks"):
        model = model_of(kind)
        for name, (length, options) in GENERATIONS.items():
            found = []
            for shared in (False, True):
                chosen = {"max_new_tokens": 12, **options}
                if "temperature" in chosen:
                    chosen["generator"] = torch.Generator().manual_seed(3)
                if not shared:
                    found.append(model.generate(ids_of(length), **chosen))
                    continue
                with share_sequence(model, mesh):
                    found.append(model.generate(ids_of(length), **chosen))
            assert torch.equal(*found), (kind, name)
    model, turns = model_of("full"), (200, 30, 7)
    for shared in (False, True):
        model.disable_cache().enable_cache()
        if not shared:
            expected = [model.generate(ids_of(length), max_new_tokens=5) for length in turns]
            continue
        with share_sequence(model, mesh):
            for length, one in zip(turns, expected, strict=True):
                assert torch.equal(model.generate(ids_of(length), max_new_tokens=5), one)
    guessed = {"max_new_tokens": 12, "prompt_lookup_num_tokens": 4}
    row = ids_of(90)[:1]
    with share_sequence(model.disable_cache(), mesh):
        found = model.generate(row, **guessed)
        with pytest.raises(ArgumentError, match="expected one row in a sequence that ranks share"):
            model.generate(ids_of(90), **guessed)
    assert torch.equal(found, model.generate(row, max_new_tokens=12))


def operate(rank: int, ranks: int) -> None:
    """Operations on a conversation in parts: right, or refused with the cache as it was."""
    mesh, model = mesh_of(ranks), model_of("full", torch.float64).enable_cache()
    ids, new = ids_of(200), ids_of(3)
    with torch.no_grad():
        whole = model_of("full", torch.float64)
        with share_sequence(model, mesh):
            model(ids)
            for length in (199, 150, 64, 3, 0):
                model.kv_cache.truncate(length)
                expected = whole(torch.cat((ids[:, :length], new), 1))[:, length:]
                assert distance(model(new), expected) <= 1e-13, length
                model.kv_cache.clear()
                model(ids)
            model.kv_cache.select([1, 0, 1])
            expected = whole(torch.cat((ids, new), 1)[[1, 0, 1]])[:, 200:]
            assert distance(model(new[[1, 0, 1]]), expected) <= 1e-13
            fork = model.kv_cache.fork()
            model(ids_of(70, 3))
            model.kv_cache = None
            model.kv_cache = fork
            expected = whole(torch.cat((ids, new, new), 1)[[1, 0, 1]])[:, 203:]
            assert distance(model(new[[1, 0, 1]]), expected) <= 1e-13
            before = model.kv_cache.length
            hook = model.decoder.blocks[1].register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(new[[1, 0, 1]])
            hook.remove()
            assert model.kv_cache.length == before
        for work in (
            lambda: model(new[[1, 0, 1]]),
            lambda: model.kv_cache.compress(8, by=lambda keys, values, positions: positions.float()),
            lambda: model.kv_cache.save(f"cache{rank}.safetensors"),
            lambda: model.kv_cache.join([model.kv_cache.fork(), model.kv_cache.fork()]),
        ):
            with pytest.raises(CacheStateError, match="this rank's part of a sequence that"):
                work()
            assert model.kv_cache.length == before


def with_caches(rank: int, ranks: int) -> None:
    for work in (run_conversation, generate, operate):
        work(rank, ranks)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_with_caches(ranks: int) -> None:
    on_ranks(ranks, with_caches, ranks)
