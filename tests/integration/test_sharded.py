"""Models in two processes: replicated by DDP, and sharded by both kinds of FSDP.

Each test is one run of two ranks, in which every check counts: a process takes seconds to begin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from tests.integration.builders import decoder, encoder_decoder, token_ids
from tests.parallel.sharing import full
from tests.ranks import on_ranks
from transformer.blocks import DecoderBlock, EncoderBlock
from transformer.generation import generate

pytestmark = pytest.mark.slow

GROUPED = {"attention": "gqa", "num_groups": 2}
BIG = {"d_model": 512, **GROUPED}
ROWS = 4


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, times: int = 1) -> None:
    model.train()
    for _ in range(times):
        optimizer.zero_grad()
        loss(model, ids).backward()
        optimizer.step()
    model.eval()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP2, block by block, with nothing registered for generation."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if isinstance(module, DecoderBlock | EncoderBlock):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def same_weights(model: nn.Module, plain: nn.Module, atol: float = 1e-5) -> None:
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(full(parameter), theirs[name].detach(), atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


# --- what each rank does ----------------------------------------------------------------------------------------------


def replicate(rank: int) -> None:
    """DDP: train, generate, train again; each rank with its half of the rows, as one process with all of them."""
    ids = token_ids(ROWS, 10)
    mine = ids.chunk(2)[rank]
    for options in ({}, BIG, {"window_size": 4, "num_sinks": 1}, {"position": "relative"}):
        plain, model = decoder(**options), DistributedDataParallel(decoder(**options))
        optimizers = sgd(plain), sgd(model)
        for _ in range(2):
            learn(plain, optimizers[0], ids, 2)
            learn(model, optimizers[1], mine, 2)
            same_weights(model.module, plain)
            expected = plain.generate(ids, max_new_tokens=5)
            assert torch.equal(model.module.generate(ids, max_new_tokens=5), expected)
            assert torch.equal(generate(model, ids, max_new_tokens=5), expected[:, 10:])
    pair = DistributedDataParallel(encoder_decoder().train())
    pair(mine, mine).square().mean().backward()
    assert all(parameter.grad is not None for parameter in pair.parameters())
    pair.eval()
    assert torch.equal(pair.module.generate(ids, max_new_tokens=5), encoder_decoder().generate(ids, max_new_tokens=5))


def shard_flat(rank: int) -> None:
    """FSDP1 over every block, whose parameters are views of a flat one."""
    ids = token_ids(ROWS, 10)
    plain = decoder(tied_embeddings=False)
    model = FullyShardedDataParallel(
        decoder(tied_embeddings=False),
        auto_wrap_policy=ModuleWrapPolicy({DecoderBlock}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    optimizers = sgd(plain), sgd(model)
    for _ in range(2):
        with torch.no_grad(), FullyShardedDataParallel.summon_full_params(model, writeback=False):
            said = model.module.generate(ids, max_new_tokens=5)
            again = model.module.generate(ids, max_new_tokens=5, use_cache=False)
        expected = plain.generate(ids, max_new_tokens=5)
        assert torch.equal(said, expected)
        assert torch.equal(again, expected)
        assert torch.equal(generate(model, ids, max_new_tokens=5), expected[:, 10:])
        learn(plain, optimizers[0], ids, 2)
        learn(model, optimizers[1], ids.chunk(2)[rank], 2)
    with torch.no_grad():
        assert_close(model(ids), plain(ids), atol=1e-4, rtol=0)


def shard_by_parameter(rank: int) -> None:
    """FSDP2: every kind of call between steps of training, and the weights of one process after each."""
    ids = token_ids(ROWS, 10)
    mine = ids.chunk(2)[rank]
    for options, sharding in (
        (GROUPED, {}),
        (BIG, {}),
        ({**BIG, "tied_embeddings": False}, {}),
        (GROUPED, {"reshard_after_forward": False}),
    ):
        plain, model = decoder(**options), shard(decoder(**options), **sharding)
        optimizers = sgd(plain), sgd(model)
        for _ in range(3):
            # Generation comes first: what it leaves behind has to be fit for training.
            for given in ({}, {"use_cache": False}):
                expected = plain.generate(ids, max_new_tokens=5, **given)
                assert torch.equal(model.generate(ids, max_new_tokens=5, **given), expected)
            assert torch.equal(torch.stack(list(model.stream(ids, max_new_tokens=5)), 1), expected[:, 10:])
            for each in (model, plain):
                each.enable_cache()
            with torch.no_grad():
                for chunk in (ids[:1, :5], ids[:1, 5:6], ids[:1, 6:7]):
                    assert_close(model(chunk), plain(chunk), atol=1e-4, rtol=0)
            for each in (model, plain):
                each.disable_cache()
            learn(plain, optimizers[0], ids)
            learn(model, optimizers[1], mine)
            with torch.inference_mode():
                assert_close(model(ids), plain(ids), atol=1e-4, rtol=0)
            same_weights(model, plain)
    pair, plain = shard(encoder_decoder()), encoder_decoder()
    for given in ({}, {"num_beams": 2}):
        assert torch.equal(
            pair.generate(ids, max_new_tokens=5, **given), plain.generate(ids, max_new_tokens=5, **given)
        )


def shard_in_half_precision(rank: int) -> None:
    """FSDP2 with bfloat16 weights while they are gathered: the weights themselves stay float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ids = token_ids(ROWS, 10)
    for build in (decoder, encoder_decoder):
        for options in (GROUPED, BIG):
            model, narrow = shard(build(**options), mp_policy=policy), build(**options).bfloat16()
            inputs = (ids, ids) if build is encoder_decoder else (ids,)
            # Before the first call, which leaves the outermost weights gathered.
            optimizer = sgd(model)
            with torch.no_grad():
                before = model(*inputs).float().square().mean()
                assert_close(model(*inputs).float(), narrow(*inputs).float(), atol=0.05, rtol=0)
            said = [model.generate(ids, max_new_tokens=5, use_cache=use) for use in (True, False)]
            assert said[0].shape == narrow.generate(ids, max_new_tokens=5).shape
            for _ in range(3):
                model.train()
                optimizer.zero_grad()
                model(*inputs).float().square().mean().backward()
                optimizer.step()
            with torch.no_grad():
                assert model.eval()(*inputs).float().square().mean() < before
            model.reshard()
            assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model = shard(decoder(**GROUPED), mp_policy=policy).enable_cache()
    with torch.no_grad():
        model(ids[:, :5])
    model.generate(ids[:, 5:], max_new_tokens=3)
    assert model.kv_cache.length == 13


def begin_on_meta(rank: int) -> None:
    """FSDP2 around a model without numbers, which come from a state dict of the whole.

    `to_empty` gives each module a tensor of its own, `tie_weights` one to both again.
    """
    ids = token_ids(ROWS, 10)
    for options in (GROUPED, {"tied_embeddings": False, "position": "learned", "max_length": 20}):
        plain = decoder(**options)
        with torch.device("meta"):
            model = decoder(**options)
        shard(model).to_empty(device="cpu")
        model.tie_weights()
        optimizers = sgd(plain), sgd(model)
        set_model_state_dict(model, plain.state_dict(), options=StateDictOptions(full_state_dict=True))
        with torch.no_grad():
            assert_close(model(ids), plain(ids), atol=1e-5, rtol=0)
        assert torch.equal(model.generate(ids, max_new_tokens=5), plain.generate(ids, max_new_tokens=5))
        learn(plain, optimizers[0], ids, 2)
        learn(model, optimizers[1], ids.chunk(2)[rank], 2)
        same_weights(model, plain)


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function", [replicate, shard_flat, shard_by_parameter, shard_in_half_precision, begin_on_meta]
)
def test_two_ranks(function: Callable[[int], None]) -> None:
    on_ranks(2, function)


def fails_on_one(rank: int) -> None:
    if rank == 1:
        raise ZeroDivisionError("of rank 1")
    dist.barrier()


def test_a_rank_that_fails_fails_the_test() -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="of rank 1"):
        on_ranks(2, fails_on_one, seconds=60)
