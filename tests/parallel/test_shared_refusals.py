"""Refusals of calls over a sequence that ranks share: in a sentence, on every rank, before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.parallel.sequences import VOCABULARY, distance, ids_of, model_of
from tests.parallel.sharing import mesh_of
from tests.ranks import on_ranks
from transformer import EncoderDecoderTransformer
from transformer.errors import ArgumentError, CacheStateError, RanksError, ShapeError
from transformer.parallel import gather_parts, parts_of, share_sequence


def refuse(rank: int) -> None:
    mesh, model = mesh_of(2), model_of("full")
    ids, part = ids_of(64), parts_of(ids_of(64), mesh_of(2))
    expect(ArgumentError, "mesh: expected a DeviceMesh", lambda: parts_of(ids, 2))
    expect(
        ArgumentError,
        "model: expected one with self-attention",
        lambda: share_sequence(nn.Linear(2, 2), mesh).__enter__(),
    )
    expect(ShapeError, "tensor: expected a length that is a multiple of 4", lambda: parts_of(ids[:, :63], mesh))
    two = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "sequence"))
    expect(ArgumentError, r"mesh\['sequence'\]", lambda: enter(model, two))
    pair = EncoderDecoderTransformer(VOCABULARY, VOCABULARY, 32, 4, 64, 1)
    expect(ArgumentError, "share_sequence\\(model.decoder, mesh\\)", lambda: enter(pair, mesh))
    with share_sequence(pair.decoder, mesh):
        expect(ArgumentError, "labels without target_ids.*: expected none", lambda: pair(ids, labels=part))
        pair(ids, part, labels=part)
    with share_sequence(model, two["sequence"]):
        model(part)
    with share_sequence(model, mesh):
        expect(RanksError, "got tokens: \\[32, 30\\] by rank", lambda: model(part[:, : 32 - 2 * rank]))
        expect(RanksError, "shape and dtype of tensor", lambda: gather_parts(part if rank else part.unsqueeze(2), mesh))
        expect(ShapeError, "two chunks of equal length, got 31", lambda: model(part[:, :31]))
        expect(ArgumentError, "return_weights: expected False", lambda: model(part, output_attentions=True))
        options: dict[str, Any] = {"max_new_tokens": 2}
        uncached = options | {"use_cache": False}
        expect(ArgumentError, "use_cache: expected a generation with", lambda: model.generate(ids, **uncached))
        expect(ArgumentError, "score by a forward over parts_of", lambda: model.score(ids))
        expect(ArgumentError, "segment_ids: expected None", lambda: model(part, segment_ids=torch.ones_like(part)))
        expect(ArgumentError, "labels, logits_to_keep: expected none", lambda: model(part, labels=part))
        attention = model.decoder.blocks[0].attention
        x = torch.randn(2, 32, 32)
        expect(ArgumentError, "attn_bias: expected None", lambda: attention(x, attn_bias=torch.zeros(32)))
        expect(ArgumentError, "expanding_context: expected None or True", lambda: model(part, expanding_context=False))
        attention.mask_rule = torch.ge
        expect(ArgumentError, "expected layers without mask_rule and score_rule", lambda: model(part))
        attention.mask_rule = None
        attention.sink_logits = nn.Parameter(torch.zeros(attention.num_heads))
        expect(ArgumentError, "expected layers without sink_logits", lambda: model(part))
        attention.sink_logits = None
        expect(ArgumentError, "expected an eager call", lambda: torch.func.vmap(attention)(x.unsqueeze(0)))
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        expect(ArgumentError, "attention_mask: expected rows without", lambda: model.generate(ids, mask, **options))
        expect(RanksError, "seed all ranks alike", lambda: model.generate(ids + rank * (ids < 1), **options))
        if rank:
            model.enable_cache()
        with torch.no_grad():
            expect(RanksError, r"got caches on \(1\) or off \(0\): \[0, 1\]", lambda: model(part))
        model.enable_cache()
        expect(CacheStateError, "to record no gradients", lambda: model(ids))
        with torch.no_grad():
            for kept in ({"cache_dtype": "int8"}, {"max_length": 100}):
                model.disable_cache().enable_cache(**kept)
                expect(ArgumentError, "share_sequence: expected caches without", lambda: model(ids))
            model.disable_cache().enable_cache()
            model(ids, labels=ids)
    other = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "sequence"))["sequence"]
    with share_sequence(model, other), torch.no_grad():
        expect(CacheStateError, "expected a call by rank", lambda: model(ids[:, :1]))
    assert model.kv_cache.length == 64
    part_of_stack = model_of("full").decoder
    with share_sequence(part_of_stack.blocks[0], mesh):
        expect(ArgumentError, "give share_sequence the whole stack", lambda: part_of_stack(torch.randn(2, 32, 32)))
    quick = DeviceMesh.from_group(dist.new_group(timeout=timedelta(seconds=2)), "cpu")
    if rank == 0:
        with share_sequence(part_of_stack, quick):
            expect(
                RanksError,
                "expected every rank that shares the model or its sequence",
                lambda: part_of_stack(torch.randn(2, 32, 32)),
            )


def enter(model: nn.Module, mesh: DeviceMesh) -> None:
    with share_sequence(model, mesh):
        pass


def expect(error: type[Exception], match: str, work: Callable[[], object]) -> None:
    with pytest.raises(error, match=match):
        work()


def compile_beside(_: int) -> None:
    """A compiled call inside is refused, or runs eagerly; outside it compiles as ever, in one graph."""
    mesh, model = mesh_of(2), model_of("full")
    ids = ids_of(32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert distance(compiled(ids), model(ids)) <= 2e-6
    with share_sequence(model, mesh):
        expect(Exception, "share_sequence", lambda: compiled(parts_of(ids, mesh)))


def refused(rank: int) -> None:
    refuse(rank)
    compile_beside(rank)


def test_refusals() -> None:
    on_ranks(2, refused)
