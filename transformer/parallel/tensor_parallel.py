"""Tensor parallelism: a model that the ranks of a mesh share, each with its part of the heads and hidden units."""

from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..cache.origin import digests
from ..errors import ArgumentError, RanksError
from .changes import Change, changes_of
from .checks import check_mesh, check_model
from .parts import distributed
from .ranks import Ranks, first_difference

ModelT = TypeVar("ModelT", bound=nn.Module)


def parallelize(model: ModelT, mesh: DeviceMesh, *, gather_logits: bool = True) -> ModelT:
    """Cuts `model` over the ranks of a mesh, in place, as `tensor_plan` says (Megatron, arXiv 1909.08053).

    Each rank has a share of the heads, of the hidden units and of the vocabulary, and sums the output of each
    attention module and feed-forward network over the ranks. Every rank calls the model with the same arguments, in
    the same order, and gets the same result; ranks must draw the same random numbers, as they do after
    `torch.manual_seed` with one seed.

    Parameters keep their names and become DTensors of their whole shape on `mesh`, also those that are whole on each
    rank, and so do gradients: optimizers, `clip_grad_norm_`, distributed checkpoints and `fully_shard` on another
    dimension of the mesh take them as they are. Optimizers are made afterwards. Modules of other classes that have
    parameters of their own keep these as they are, plain and equal on all ranks. Attention modules then have
    `num_heads` and `num_groups` of this rank, and a cache of its share; `attn_bias` and weights that are returned are
    of all heads.

    Args:
        model: attention modules, blocks, models of this library, or modules composed of them; also on the meta device,
            to be filled later.
        mesh: of one dimension, of any name.
        gather_logits: whether each rank gets the logits of the whole vocabulary, which `generate` needs. False: logits
            are a DTensor, cut over the vocabulary, for `torch.distributed.tensor.parallel.loss_parallel`.

    Raises:
        ArgumentError: for a mesh or a model that cannot be used, such as heads that the ranks do not divide.
        CacheStateError: for a model with a conversation.
        RanksError: where ranks were given different models or weights. On every rank; nothing has changed then.
    """
    check_mesh(mesh)
    ranks = Ranks(mesh)
    changes = ranks.agreed(lambda: _checked_changes(model, ranks, gather_logits))
    _check_alike(model, ranks)
    ranks.check_equal({"gather_logits": str(gather_logits)})
    parameters = {}
    with torch.no_grad():
        for change in changes:
            for name, placement in change.placements.items():
                parameter = change.module._parameters.get(name)
                if parameter is not None and id(parameter) not in parameters:
                    parameters[id(parameter)] = distributed(parameter, placement, ranks)
    for change in changes:
        _apply(change, parameters)
    return model


def _checked_changes(model: nn.Module, ranks: Ranks, gather_logits: bool) -> list[Change]:
    check_model(model)
    if not isinstance(gather_logits, bool):
        raise ArgumentError(f"gather_logits: expected True or False, got {gather_logits!r}")
    return changes_of(model, ranks, gather_logits)


def _check_alike(model: nn.Module, ranks: Ranks) -> None:
    """Raises RanksError where the parameters of the ranks differ."""
    sizes = {name: (tuple(each.shape), str(each.dtype)) for name, each in model.named_parameters()}
    said = ranks.told((sizes, digests(model)))
    for what, column in (("another shape or dtype", 0), ("other numbers", 1)):
        values = [each[column] for each in said]
        differs = first_difference(values)
        if differs is not None:
            first, other = values[0] or {}, values[differs] or {}
            differing = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
            raise RanksError(
                f"model: expected equal parameters on all ranks, got {differing[0]} with {what} on rank "
                f"{differs} than on rank 0 ({len(differing)} differ); build or load the model alike, after "
                "torch.manual_seed with one seed"
            )


def _apply(change: Change, parameters: dict[int, nn.Parameter]) -> None:
    module = change.module
    for name in change.placements:
        parameter = module._parameters.get(name)
        if parameter is not None:
            # Not by attribute: what intercepts the registration of parameters would copy there, and untie.
            module._parameters[name] = parameters[id(parameter)]
    for name, value in change.attributes.items():
        setattr(module, name, value)
    module.__class__ = change.kind
