"""Sequences that ranks share: logits, gradients and generation of ranks are those of one process.

One process reads the whole sequence, on each rank; the ranks then read it together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.blocks.stacks import MIXED, WITH_SINKS, make
from tests.ranks import on_ranks
from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer, GroupQueryAttention
from transformer.errors import ArgumentError, CacheStateError, RanksError, ShapeError
from transformer.models import EncoderTransformer
from transformer.parallel import gather_parts, parts_of, share_sequence
from transformer.positions import RotaryEmbedding

KINDS: Mapping[str, dict[str, Any]] = {
    "full": {"position": "rotary"},
    "groups": {"position": "rotary", "attention": "gqa", "num_groups": 2},
    "ALiBi": {"position": "alibi"},
    "relative": {"position": "relative"},
    "learned": {"position": "learned", "max_length": 600},
    "sinusoidal": {"position": "sinusoidal"},
    "norm and cap": {"position": "rotary", "qk_norm": True, "softcap": 5.0, "logit_softcap": 20.0},
    "window": {"position": "rotary", "window_size": 24},
    "window and sinks": {"position": "rotary", "window_size": 24, "num_sinks": 4},
    "window of several chunks": {"position": "rotary", "window_size": 150},
    "mixed": {"position": "rotary", "window_size": 24, "layer_pattern": "sliding full"},
    "ALiBi window": {"position": "alibi", "window_size": 24, "num_sinks": 3},
}
RANKS = [2, pytest.param(4, marks=pytest.mark.slow)]
VOCABULARY = 60


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> DecoderOnlyTransformer:
    torch.manual_seed(0)
    return DecoderOnlyTransformer(VOCABULARY, 32, 4, 64, 2, **KINDS[kind]).to(dtype).eval()


def ids_of(length: int, batch: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def mesh_of(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("sequence",))


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def mean_over_ranks(gradients: list[Tensor], ranks: int) -> list[Tensor]:
    """What DDP and FSDP2 compute."""
    for gradient in gradients:
        dist.all_reduce(gradient)
    return [gradient / ranks for gradient in gradients]


def same_bits_everywhere(tensor: Tensor, ranks: int) -> bool:
    every = [torch.empty_like(tensor) for _ in range(ranks)]
    dist.all_gather(every, tensor.contiguous())
    return all(torch.equal(each, tensor) for each in every)


# --- without caches -------------------------------------------------------------------------------------------------


def train(rank: int, ranks: int) -> None:
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


# --- with caches ----------------------------------------------------------------------------------------------------


CALLS = (256, 1, 1, 70, 1, 40, 60, 1, 1)
"""A prompt that ranks share, tokens one by one, and turns of several tokens that each rank is given."""


def chat(_: int, ranks: int) -> None:
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
            assert same_bits_everywhere(logits, ranks), kind
            assert model.kv_cache.length == length
            if "window_size" not in KINDS[kind]:
                # Chunks are equal, and blocks of 64 come in turns.
                assert abs(model.kv_cache.cached_length - length / ranks) <= 64
                assert model.kv_cache.nbytes_used <= (length / ranks + 64) * 2 * 2 * 2 * 32 * dtype.itemsize


GENERATIONS: Mapping[str, tuple[int, dict[str, Any]]] = {
    "greedy": (300, {}),
    "prompt in chunks": (300, {"prefill_chunk": 100}),
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


# --- refusals -------------------------------------------------------------------------------------------------------


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
        expect(ArgumentError, "labels: expected whole rows", lambda: pair(ids, labels=part))
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
        expect(ArgumentError, "labels: expected whole rows", lambda: model(part, labels=part))
        attention = model.decoder.blocks[0].attention
        x = torch.randn(2, 32, 32)
        expect(ArgumentError, "attn_bias: expected None", lambda: attention(x, attn_bias=torch.zeros(32)))
        expect(ArgumentError, "expanding_context: expected None or True", lambda: model(part, expanding_context=False))
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


def compile_beside(rank: int) -> None:
    """A compiled call inside is refused, or runs eagerly; outside it compiles as ever, in one graph."""
    mesh, model = mesh_of(2), model_of("full")
    ids = ids_of(32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert distance(compiled(ids), model(ids)) <= 2e-6
    with share_sequence(model, mesh):
        expect(Exception, "share_sequence", lambda: compiled(parts_of(ids, mesh)))


def train_wrapped(rank: int, ranks: int) -> None:
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


# --- the runs: a process takes seconds to begin, so each checks much ------------------------------------------------


def without_caches(rank: int, ranks: int) -> None:
    for work in (train, read_exactly, read_padded, read_compositions, train_wrapped):
        work(rank, ranks)


def with_caches(rank: int, ranks: int) -> None:
    for work in (chat, generate, operate):
        work(rank, ranks)


def refused(rank: int) -> None:
    refuse(rank)
    compile_beside(rank)


@pytest.mark.parametrize("ranks", RANKS)
def test_without_caches(ranks: int) -> None:
    on_ranks(ranks, without_caches, ranks)


@pytest.mark.parametrize("ranks", RANKS)
def test_with_caches(ranks: int) -> None:
    on_ranks(ranks, with_caches, ranks)


def test_refusals() -> None:
    on_ranks(2, refused)
