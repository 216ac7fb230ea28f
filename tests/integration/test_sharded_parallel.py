"""FSDP2 over one dimension of a mesh, with tensor parallelism over the other: training, generation, checkpoints, meta.

Each run is compared with one process that trains the whole model on all rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.testing import assert_close

from tests.integration.builders import decoder, token_ids
from tests.integration.test_sharded_training import (
    LENGTH,
    MODELS,
    ROWS,
    STEPS,
    adam,
    as_it_is,
    compiled,
    continue_from,
    learn,
    learn_in_halves,
    own_name,
    same_tokens,
    same_weights,
    save_after_steps,
)
from tests.ranks import on_ranks
from transformer import DecoderOnlyTransformer
from transformer.parallel import parallelize

pytestmark = pytest.mark.slow


def mesh_of(data: int, tensor: int) -> DeviceMesh:
    return init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))


def shared(model: DecoderOnlyTransformer, mesh: DeviceMesh, around: Any = as_it_is, **options: Any) -> Any:
    """Cut over the ranks of "tensor", and then sharded over those of "data"."""
    parallelize(model, mesh["tensor"])
    for place, block in enumerate(model.decoder.blocks):
        model.decoder.blocks[place] = fully_shard(around(block), mesh=mesh["data"], **options)
    return fully_shard(model, mesh=mesh["data"], **options)


def of_this_rank(rows: Tensor, mesh: DeviceMesh) -> Tensor:
    return rows.chunk(mesh["data"].size())[mesh["data"].get_local_rank()]


def mean_of_ranks(loss: Tensor, mesh: DeviceMesh) -> Tensor:
    total = loss.clone()
    dist.all_reduce(total, group=mesh["data"].get_group())
    return total / mesh["data"].size()


def trained_alike(plain: DecoderOnlyTransformer, model: DecoderOnlyTransformer, ids: Tensor, mesh: DeviceMesh) -> None:
    optimizers = adam(plain), adam(model)
    for given in ({}, {"use_cache": False}, {"num_beams": 2}):
        same_tokens(model, plain, ids, **given)
        expected = learn(plain, optimizers[0], ids)
        found = mean_of_ranks(learn(model, optimizers[1], of_this_rank(ids, mesh)), mesh)
        assert_close(found, expected, atol=1e-5, rtol=0)
    same_weights(model, plain)


# --- What each rank does ----------------------------------------------------------------------------------------------


def train(rank: int, data: int, tensor: int) -> None:
    mesh, ids = mesh_of(data, tensor), token_ids(ROWS, LENGTH)
    for options, around in (
        (MODELS["gqa"], as_it_is),
        (MODELS["relative"], checkpoint_wrapper),
        ({"position": "alibi", "norm": "layer", "attention_bias": True}, as_it_is),
        (MODELS["gqa"], compiled),
    ):
        trained_alike(decoder(**options), shared(decoder(**options), mesh, around), ids, mesh)
        torch.compiler.reset()
    train_in_half_precision(mesh, ids)
    begin_on_meta(mesh, ids)


def train_in_half_precision(mesh: DeviceMesh, ids: Tensor) -> None:
    """Sums over ranks are in bfloat16 here: close to one process that casts a copy, and no closer."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    plain, model = decoder(**MODELS["gqa"]), shared(decoder(**MODELS["gqa"]), mesh, mp_policy=policy)
    optimizers = adam(plain), adam(model)
    for _ in range(STEPS):
        narrow = decoder(**MODELS["gqa"])
        narrow.load_state_dict(plain.state_dict())
        expected = learn_in_halves(plain, narrow.bfloat16().train(), optimizers[0], ids, mesh["data"].size())
        found = mean_of_ranks(learn(model, optimizers[1], of_this_rank(ids, mesh)), mesh)
        assert_close(found, expected, atol=0.03, rtol=0)
        assert model.generate(ids, max_new_tokens=3).shape == (ROWS, LENGTH + 3)
    model.reshard()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def begin_on_meta(mesh: DeviceMesh, ids: Tensor) -> None:
    """Cut and sharded without numbers, which come from a state dict of the whole.

    PyTorch gives out the parts of a whole tensor over two dimensions of a mesh only where these divide it: 64 tokens.
    """
    for options in MODELS.values():
        torch.manual_seed(1)
        plain = DecoderOnlyTransformer(64, 32, 4, 64, 2, **options).eval()
        with torch.device("meta"):
            model = DecoderOnlyTransformer(64, 32, 4, 64, 2, **options).eval()
        shared(model, mesh).to_empty(device="cpu")
        model.tie_weights()
        set_model_state_dict(model, plain.state_dict(), options=StateDictOptions(full_state_dict=True))
        trained_alike(plain, model, ids, mesh)


def save_trained(rank: int, data: int, tensor: int, folder: str) -> None:
    mesh = mesh_of(data, tensor)
    save_after_steps(shared(decoder(**MODELS["gqa"]), mesh), of_this_rank(token_ids(ROWS, LENGTH), mesh), folder)


def continue_training(rank: int, data: int, tensor: int, folder: str) -> None:
    mesh = mesh_of(data, tensor)
    continue_from(shared(decoder(**MODELS["gqa"]), mesh), of_this_rank(token_ids(ROWS, LENGTH), mesh), folder)


def loss_over_the_vocabulary(rank: int) -> None:
    """Logits stay cut over the vocabulary, and `loss_parallel` reads them so."""
    mesh, ids = mesh_of(2, 2), token_ids(ROWS, LENGTH)
    plain, model = decoder(**MODELS["gqa"]), decoder(**MODELS["gqa"])
    parallelize(model, mesh["tensor"], gather_logits=False)
    for block in model.decoder.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    optimizers = adam(plain), adam(model)
    for _ in range(STEPS):
        learn(plain, optimizers[0], ids)
        mine = of_this_rank(ids, mesh)
        optimizers[1].zero_grad()
        with loss_parallel():
            logits = model.train()(mine)
            F.cross_entropy(logits.flatten(0, 1), mine.roll(-1, 1).flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers[1].step()
    same_weights(model, plain)


# --- The tests --------------------------------------------------------------------------------------------------------


def test_two_ranks_of_one_layer_train_as_one_process() -> None:
    on_ranks(2, train, 1, 2)


def test_two_by_two_ranks_train_as_one_process() -> None:
    on_ranks(4, train, 2, 2, seconds=600.0)
    on_ranks(4, loss_over_the_vocabulary)


@pytest.mark.filterwarnings("ignore:torch.distributed is .* uninitialized:UserWarning")
def test_a_checkpoint_is_continued_by_ranks_that_are_arranged_otherwise(tmp_path: Path) -> None:
    on_ranks(4, save_trained, 2, 2, str(tmp_path))
    on_ranks(2, continue_training, 1, 2, str(tmp_path))
    on_ranks(4, continue_training, 4, 1, str(tmp_path))
    plain = decoder(**MODELS["gqa"])
    state = {"model": plain.state_dict()}
    before = {own_name(name): value.clone() for name, value in state["model"].items()}
    dcp.load(state, checkpoint_id=str(tmp_path))
    assert not any(torch.equal(before[name], value) for name, value in state["model"].items())
