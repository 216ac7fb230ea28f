"""Calls that ranks make unlike each other, and contexts in each other: a sentence on every rank, or right numbers."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.parallel.sequences import VOCABULARY, distance, ids_of, model_of
from tests.parallel.sharing import CLOSE, both, decoder, mesh_of, unsettled
from tests.parallel.test_shared_refusals import expect
from tests.ranks import on_ranks
from transformer import EncoderDecoderTransformer, MultiHeadAttention
from transformer.errors import ArgumentError, RanksError
from transformer.parallel import gather_parts, own_part, parallelize, parts_of, share_sequence


def test_shared_sequences() -> None:
    on_ranks(2, _sequences)


def _sequences(rank: int) -> None:
    mesh, ids = mesh_of(2), ids_of(64)
    part = parts_of(ids, mesh)
    _unlike(rank)
    # The next tokens of a part, and the last of the sequence, are on other ranks.
    model = model_of("full")
    with share_sequence(model, mesh):
        expect(ArgumentError, "labels, logits_to_keep: expected none", lambda: model(part, labels=part))
        expect(ArgumentError, "labels, logits_to_keep: expected none", lambda: model(part, logits_to_keep=1))
    pair = EncoderDecoderTransformer(VOCABULARY, VOCABULARY, 32, 4, 64, 1)
    with share_sequence(pair.decoder, mesh):
        expect(ArgumentError, "labels without target_ids", lambda: pair(ids, labels=part))
    # Contexts of several models, and of one model over other ranks: the innermost that covers a module.
    other = model_of("ALiBi")
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "sequence"))["sequence"]
    with share_sequence(model, mesh):
        with share_sequence(other, mesh):
            parts = [each(part) for each in (model, other)]
        with share_sequence(model, alone):
            whole = model(ids)
        after = model(part)
    for found, each in zip(parts, (model, other), strict=True):
        assert distance(gather_parts(found, mesh), each(ids)) <= CLOSE
    assert distance(whole, model(ids)) <= CLOSE
    assert torch.equal(after, parts[0])


def _unlike(rank: int) -> None:
    """The backend ends processes that exchange unequal sizes: these differ before."""
    mesh, ids = mesh_of(2), ids_of(64)
    part = parts_of(ids, mesh)
    model = model_of("full", torch.float64 if rank else torch.float32)
    with share_sequence(model, mesh):
        expect(RanksError, r"bits of a number: \[32, 64\]", lambda: model(part))
    model = model_of("window" if rank else "full")
    with share_sequence(model, mesh):
        expect(RanksError, "options of layers", lambda: model(part))
    model = model_of("full")
    with torch.no_grad(), share_sequence(model, mesh):
        if rank:
            model.enable_cache()
        expect(RanksError, r"caches on \(1\) or off \(0\): \[0, 1\]", lambda: model(part))
    expect(RanksError, "shape and dtype of tensor", lambda: gather_parts(torch.zeros((2, 4, 1)[: 2 + rank]), mesh))
    expect(
        RanksError,
        "shape and dtype of tensor",
        lambda: gather_parts(torch.zeros(2, 4, dtype=torch.float64 if rank else None), mesh),
    )
    expect(ArgumentError, "tensor: expected a tensor", lambda: parts_of(3, mesh))
    expect(ArgumentError, "tensor: expected a tensor", lambda: gather_parts([1], mesh))


def test_parallel_models() -> None:
    on_ranks(2, _parallel)


def _parallel(_rank: int) -> None:
    mesh, x = mesh_of(2), torch.randn(2, 7, 32, dtype=torch.float64)
    whole, shared = both(lambda: unsettled(MultiHeadAttention(32, 8, True).double()), mesh)
    # A bias that is trained has the gradients of all heads, on every rank.
    for shape in ((2, 8, 7, 7), (8, 7, 7), (1, 1, 7, 7), (7,)):
        biases = [torch.linspace(-1, 1, 7).double().expand(shape).clone().requires_grad_() for _ in "12"]
        for module, bias in zip((whole, shared), biases, strict=True):
            module(x, attn_bias=bias).square().sum().backward()
        torch.testing.assert_close(biases[1].grad, biases[0].grad, msg=f"{shape}")
    _, cut = both(lambda: decoder().eval(), mesh, gather_logits=False)
    ids = torch.randint(61, (1, 5))
    with pytest.raises(ArgumentError, match=r"labels: expected a model that gives logits .*loss_parallel"):
        cut(ids, labels=ids)
    with pytest.raises(ArgumentError, match=r"score, perplexity: .* gather_logits=True"):
        cut.score(ids)


@pytest.mark.slow
def test_a_conversation_goes_on_over_its_own_ranks() -> None:
    on_ranks(4, _other_ranks, seconds=60)


def _other_ranks(rank: int) -> None:
    mesh, model, ids = (
        init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence")),
        model_of("full"),
        ids_of(64),
    )
    model.enable_cache()
    with torch.no_grad(), share_sequence(model, mesh["sequence"]):
        model(ids)
    with torch.no_grad(), share_sequence(model, mesh["data"]):
        expect(RanksError, "a cache of other ranks", lambda: model(ids[:, :1]))
    assert model.kv_cache.length == 64
    shared = parallelize(decoder(), mesh["sequence"])
    fully_shard(shared, mesh=mesh["data"])
    expect(ArgumentError, "parameter: expected one of a parallel model", lambda: own_part(next(shared.parameters())))
