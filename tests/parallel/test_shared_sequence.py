"""Sequences that ranks share, without caches: logits and gradients of the ranks are those of one process.

One process reads the whole sequence, on each rank; the ranks then read it together.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.fsdp import fully_shard

from tests.blocks.stacks import MIXED, WITH_SINKS, make
from tests.parallel.sequences import KINDS, VOCABULARY, distance, ids_of, model_of
from tests.parallel.sharing import mesh_of
from tests.ranks import on_ranks
from transformer import EncoderDecoderTransformer, GroupQueryAttention
from transformer.errors import ArgumentError
from transformer.models import EncoderTransformer
from transformer.parallel import gather_parts, parts_of, share_sequence
from transformer.positions import RotaryEmbedding


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def mean_over_ranks(gradients: list[Tensor], ranks: int) -> list[Tensor]:
    """What DDP and FSDP2 compute."""
    for gradient in gradients:
        dist.all_reduce(gradient)
    return [gradient / ranks for gradient in gradients]


def train(_: int, ranks: int) -> None:
    mesh = mesh_of(ranks)
    for kind in KINDS:
        for dtype, length, most in ((torch.float64, 8 * ranks, 1e-13), (torch.float32, 512, 5e-7)):
            model, ids = model_of(kind, dtype).train(), ids_of(length)
            targets, weights = ids.roll(-1, 1), list(model.parameters())
            whole = model(ids)
            with share_sequence(model, mesh):
                part = model(parts_of(ids, mesh))
            logits = gather_parts(part, mesh)
            assert distance(logits, whole) <= most * whole.abs().max(), kind
            expected = torch.autograd.grad(loss_of(whole, targets), weights)
            own = torch.autograd.grad(loss_of(part, parts_of(targets, mesh)), weights, retain_graph=True)
            of_whole = torch.autograd.grad(loss_of(logits, targets), weights)
            for gradients in (own, of_whole):
                for gradient, one in zip(mean_over_ranks(list(gradients), ranks), expected, strict=True):
                    assert distance(gradient, one) <= 4 * most, kind


def read_exactly(_: int, ranks: int) -> None:
    """Where the kernels of one process and of a chunk take blocks of one shape, every bit is equal."""
    mesh = mesh_of(ranks)
    for kind, options in KINDS.items():
        windowed = "window_size" in options
        if kind == "mixed":
            continue
        model, ids = model_of(kind), ids_of(512 if windowed else 128)
        with torch.set_grad_enabled(windowed):
            whole = model(ids)
            with share_sequence(model, mesh):
                part = model(parts_of(ids, mesh))
        assert torch.equal(gather_parts(part, mesh), whole), kind


def read_padded(_: int, ranks: int) -> None:
    mesh, length = mesh_of(ranks), 16 * ranks
    ids, real = ids_of(length, 3), torch.arange(length) < torch.tensor([[length], [5], [length - 3]])
    models: list[nn.Module] = [model_of(kind, torch.float64) for kind in ("full", "window and sinks", "learned")]
    models.append(EncoderTransformer(VOCABULARY, 32, 4, 64, 2, position="rotary").double().eval())
    models.append(EncoderTransformer(VOCABULARY, 32, 4, 64, 2, position="learned", max_length=256).double().eval())
    for model in models:
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                whole = model(ids, attention_mask=real)
                with share_sequence(model, mesh):
                    part = model(parts_of(ids, mesh), attention_mask=parts_of(real, mesh))
                assert distance(gather_parts(part, mesh), whole) <= 1e-13
    with share_sequence(models[0], mesh), pytest.raises(ArgumentError, match="attention_mask: expected padding on the"):
        models[0](parts_of(ids, mesh), attention_mask=parts_of(real.flip(1), mesh))


def read_compositions(_: int, ranks: int) -> None:
    """Stacks of a user's own, one module alone, and a decoder with a source."""
    mesh, length = mesh_of(ranks), 16 * ranks
    x = torch.randn(2, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for layers in (MIXED, WITH_SINKS):
        for scheme in ("rotary halves", "alibi"):
            stack = make(layers, scheme, cached=False)
            with share_sequence(stack, mesh):
                part = stack(parts_of(x, mesh))
            assert distance(gather_parts(part, mesh), stack(x)) <= 1e-13
    for causal in (True, False):
        alone = GroupQueryAttention(16, 4, 2, causal, position=RotaryEmbedding(4)).double()
        with share_sequence(alone, mesh):
            part = alone(parts_of(x, mesh))
        assert distance(gather_parts(part, mesh), alone(x)) <= 1e-13
    pair = EncoderDecoderTransformer(VOCABULARY, VOCABULARY, 32, 4, 64, 2).double().eval()
    source, target = ids_of(9), ids_of(length)
    with share_sequence(pair.decoder, mesh):
        part = pair(source, parts_of(target, mesh))
    assert distance(gather_parts(part, mesh), pair(source, target)) <= 1e-13
    with torch.no_grad(), share_sequence(pair.decoder, mesh):
        shared = pair.generate(source, max_new_tokens=6)
    assert torch.equal(shared, pair.generate(source, max_new_tokens=6))


def train_wrapped(_: int, ranks: int) -> None:
    """DDP and FSDP2 over the mesh: gradients as those of one process, with nothing said about the sequence."""
    mesh, model, alone = mesh_of(ranks), model_of("mixed", torch.float64), model_of("mixed", torch.float64)
    ids = ids_of(16 * ranks)
    targets = ids.roll(-1, 1)
    loss_of(alone(ids), targets).backward()
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())
    with share_sequence(wrapped, mesh):
        loss_of(wrapped(parts_of(ids, mesh)), parts_of(targets, mesh)).backward()
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert distance(one.grad, other.grad) <= 1e-13
    # FSDP2, whose blocks are computed again inside backward.
    sharded = model_of("mixed", torch.float64)
    for block in sharded.decoder.blocks:
        checkpoint(block)
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    with share_sequence(sharded, mesh):
        loss_of(sharded(parts_of(ids, mesh)), parts_of(targets, mesh)).backward()
    for one, other in zip(sharded.parameters(), alone.parameters(), strict=True):
        assert distance(one.grad.full_tensor(), other.grad) <= 1e-13


def without_caches(rank: int, ranks: int) -> None:
    for work in (train, read_exactly, read_padded, read_compositions, train_wrapped):
        work(rank, ranks)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_without_caches(ranks: int) -> None:
    on_ranks(ranks, without_caches, ranks)
