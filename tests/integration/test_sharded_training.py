"""Trainings under FSDP2: recomputed activations, compiled blocks, mixed precision, and checkpoints of other ranks.

Each run is compared with one process that trains the whole model on all rows: losses, weights, and generated tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tests.integration.builders import decoder, padding, token_ids
from tests.parallel.sharing import full
from tests.ranks import on_ranks
from transformer import DecoderOnlyTransformer
from transformer.cache import Step

pytestmark = pytest.mark.slow

ROWS, LENGTH, STEPS = 4, 10, 3
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {"attention": "gqa", "num_groups": 2, "qk_norm": True},
    "relative": {
        "position": "relative",
        "relative_per_layer": True,
        "window_size": 4,
        "num_sinks": 1,
        "tied_embeddings": False,
    },
}


class Recomputed(nn.Module):
    """A block of a user, whose activations are computed again in the backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        out: Tensor = checkpoint(self.block, x, step=step, use_reentrant=False)
        return out


def as_it_is(block: nn.Module) -> nn.Module:
    return block


def compiled(block: nn.Module) -> nn.Module:
    block.compile(backend="aot_eager")
    return block


def compiled_recomputed(block: nn.Module) -> nn.Module:
    return compiled(checkpoint_wrapper(block))


EAGER = (as_it_is, checkpoint_wrapper, Recomputed)
COMPILED = (compiled, compiled_recomputed)


def sharded(
    model: DecoderOnlyTransformer, around: Callable[[nn.Module], nn.Module] = as_it_is, **options: Any
) -> DecoderOnlyTransformer:
    """FSDP2 over all ranks, block by block, around what `around` makes of a block."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for place, block in enumerate(model.decoder.blocks):
        model.decoder.blocks[place] = fully_shard(around(block), mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    # With an `eps` far above rounding: a gradient of about 0 would else move its weight by rounding alone.
    return torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-3)


def loss_of(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over all tokens but padding; rows have equal numbers of them."""
    labels = ids.roll(-1, 1) if mask is None else ids.roll(-1, 1).masked_fill(~mask, -100)
    return F.cross_entropy(model(ids, mask).float().flatten(0, 1), labels.flatten())


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """One step; its loss."""
    model.train()
    optimizer.zero_grad()
    loss = loss_of(model, ids, mask)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.eval()
    return loss.detach()


def of_this_rank(rows: Tensor) -> Tensor:
    return rows.chunk(dist.get_world_size())[dist.get_rank()]


def mean_of_ranks(loss: Tensor) -> Tensor:
    total = loss.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def own_name(name: str) -> str:
    """A parameter's name without those of the wrappers around its block."""
    for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod.", "block."):
        name = name.replace(wrapper, "")
    return name


def same_weights(model: nn.Module, plain: nn.Module, atol: float = 2e-5) -> None:
    expected = dict(plain.named_parameters())
    names = [own_name(name) for name, _ in model.named_parameters()]
    assert sorted(names) == sorted(expected)
    for name, parameter in zip(names, model.parameters(), strict=True):
        assert_close(
            full(parameter), expected[name].detach(), atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


def same_tokens(model: DecoderOnlyTransformer, plain: DecoderOnlyTransformer, ids: Tensor, **options: Any) -> None:
    """`generate` gives the same, with nothing registered for it."""
    expected = plain.generate(ids, max_new_tokens=3, **options)
    assert torch.equal(model.generate(ids, max_new_tokens=3, **options), expected)


# --- What each rank does ----------------------------------------------------------------------------------------------


def train_as_one_process(rank: int) -> None:
    """Three steps with a generation before each, around every kind of block, with padding and without."""
    ids = token_ids(ROWS, LENGTH)
    real = padding("both", 4, LENGTH)[3:].expand(ROWS, -1)
    for options, kinds, masks in (
        (MODELS["gqa"], EAGER, (None, real, None)),
        (MODELS["relative"], EAGER, (real, None, real)),
        (MODELS["gqa"], COMPILED, (real, None)),
    ):
        for around, mask in zip(kinds, masks, strict=True):
            trained_alike(decoder(**options), sharded(decoder(**options), around), ids, mask)
            torch.compiler.reset()
    # One group of all weights: blocks that share a bias cannot be sharded one by one.
    options = {"position": "relative"}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    trained_alike(decoder(**options), fully_shard(decoder(**options), mesh=mesh), ids)
    # The whole model compiled, after it was sharded.
    model = sharded(decoder(**MODELS["gqa"]))
    model.compile(backend="aot_eager")
    trained_alike(decoder(**MODELS["gqa"]), model, ids)


def trained_alike(
    plain: DecoderOnlyTransformer, model: DecoderOnlyTransformer, ids: Tensor, mask: Tensor | None = None
) -> None:
    optimizers = adam(plain), adam(model)
    mine = None if mask is None else of_this_rank(mask)
    for given in ({}, {"use_cache": False}, {"num_beams": 2}):
        same_tokens(model, plain, ids, **given)
        expected = learn(plain, optimizers[0], ids, mask)
        found = mean_of_ranks(learn(model, optimizers[1], of_this_rank(ids), mine))
        assert_close(found, expected, atol=1e-5, rtol=0)
    same_weights(model, plain)


def train_in_half_precision(rank: int) -> None:
    """The weights are float32 and computed with in bfloat16: as one process that casts a copy in each step."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ids = token_ids(ROWS, LENGTH)
    for options, kinds in ((MODELS["relative"], (as_it_is,)), (MODELS["gqa"], (checkpoint_wrapper, compiled))):
        for around in kinds:
            plain, model = decoder(**options), sharded(decoder(**options), around, mp_policy=policy)
            optimizers = tuple(torch.optim.SGD(each.parameters(), 0.1) for each in (plain, model))
            for _ in range(STEPS):
                narrow = copy.deepcopy(plain).bfloat16()
                same_tokens(model, narrow, ids)
                expected = learn_in_halves(plain, narrow.train(), optimizers[0], ids, dist.get_world_size())
                assert_close(mean_of_ranks(learn(model, optimizers[1], of_this_rank(ids))), expected, atol=1e-3, rtol=0)
            model.reshard()
            assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
            same_weights(model, plain, atol=1e-3)
            torch.compiler.reset()


def learn_in_halves(
    plain: nn.Module, narrow: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, ranks: int
) -> Tensor:
    """One step of `plain` with the gradients of `narrow`, its copy in bfloat16, added up in float32 over the ranks."""
    optimizer.zero_grad()
    losses = []
    for rows in ids.chunk(ranks):
        narrow.zero_grad()
        losses.append(loss_of(narrow, rows, None))
        losses[-1].backward()
        for parameter, other in zip(plain.parameters(), narrow.parameters(), strict=True):
            share = other.grad.float() / ranks
            parameter.grad = share if parameter.grad is None else parameter.grad + share
    nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    return torch.stack(losses).mean().detach()


def save_after_steps(model: nn.Module, own: Tensor, folder: str) -> None:
    """A training by the rows of this rank, saved in its middle."""
    optimizer = adam(model)
    for _ in range(STEPS):
        learn(model, optimizer, own)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def continue_from(model: nn.Module, own: Tensor, folder: str) -> None:
    """The training goes on by other ranks, as in one process that was never interrupted."""
    ids, plain = token_ids(ROWS, LENGTH), decoder(**MODELS["gqa"])
    optimizers = adam(plain), adam(model)
    for _ in range(STEPS):
        learn(plain, optimizers[0], ids)
    weights, state = get_state_dict(model, optimizers[1])
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizers[1], model_state_dict=weights, optim_state_dict=state)
    same_weights(model, plain)
    same_tokens(model, plain, ids)
    for _ in range(STEPS):
        learn(plain, optimizers[0], ids)
        learn(model, optimizers[1], own)
    same_weights(model, plain)


def save_trained(rank: int, folder: str) -> None:
    save_after_steps(sharded(decoder(**MODELS["gqa"])), of_this_rank(token_ids(ROWS, LENGTH)), folder)


def continue_training(rank: int, folder: str) -> None:
    continue_from(sharded(decoder(**MODELS["gqa"])), of_this_rank(token_ids(ROWS, LENGTH)), folder)


# --- The tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [train_as_one_process, train_in_half_precision])
def test_two_ranks(function: Callable[[int], None]) -> None:
    on_ranks(2, function)


@pytest.mark.filterwarnings("ignore:torch.distributed is .* uninitialized:UserWarning")
@pytest.mark.parametrize(("saving", "loading"), [(2, 4), (4, 2)])
def test_a_checkpoint_is_continued_by_another_number_of_ranks(tmp_path: Path, saving: int, loading: int) -> None:
    on_ranks(saving, save_trained, str(tmp_path))
    on_ranks(loading, continue_training, str(tmp_path))
    # Without ranks: the model alone, by its own names.
    plain, expected = decoder(**MODELS["gqa"]), decoder(**MODELS["gqa"])
    optimizer = adam(expected)
    for _ in range(STEPS):
        learn(expected, optimizer, token_ids(ROWS, LENGTH))
    state = {"model": plain.state_dict()}
    dcp.load(state, checkpoint_id=str(tmp_path))
    plain.load_state_dict(state["model"])
    same_weights(plain, expected)
