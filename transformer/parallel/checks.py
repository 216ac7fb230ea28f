"""Checks of a model and a mesh before anything is cut: every refusal, in a sentence."""

from collections.abc import Container, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement

from ..attention import Attention
from ..cache import CacheHolder
from ..errors import ArgumentError, CacheStateError, shown
from ..positions import ALiBi, RelativePositionBias, Rotation, ScoreBias
from .ranks import Ranks


def check_mesh(mesh: object) -> None:
    """Raises ArgumentError unless this is a mesh of one dimension on which this rank is."""
    if not isinstance(mesh, DeviceMesh):
        raise ArgumentError(
            f"mesh: expected a DeviceMesh of one dimension, such as init_device_mesh(device, (2,)), got {shown(mesh)}"
        )
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        remedy = f"give one, such as mesh[{names[-1]!r}]" if names else "name its dimensions, and give one of them"
        raise ArgumentError(f"mesh: expected one dimension, got {mesh.ndim} of sizes {tuple(mesh.shape)}; {remedy}")
    if mesh.get_coordinate() is None:
        raise ArgumentError(
            f"mesh: expected one on which this rank is, got ranks {mesh.mesh.tolist()} on rank {dist.get_rank()}; call "
            "this on the ranks of the mesh alone"
        )


def check_model(model: object) -> None:
    """Raises ArgumentError for a model whose parameters are shared already, and CacheStateError for a conversation."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, parameter in model.named_parameters():
        # By name, since FSDP1 and others have classes of their own too.
        if type(parameter).__name__ == "DTensor":
            raise ArgumentError(
                f"model: expected one that is whole, got {name} as a DTensor: it is parallel or sharded already; "
                "parallelize a model once, and before fully_shard"
            )
    for path, module in model.named_modules():
        if "_fsdp_wrapped_module" in module._modules:
            raise ArgumentError(
                f"model: expected one that is whole, got {path or 'the model'} wrapped by FSDP; parallelize it first, "
                "and then shard it with fully_shard (FSDP2)"
            )
        if isinstance(module, CacheHolder) and module.slot.cache is not None:
            raise CacheStateError(
                f"model: expected empty caches, whose heads are those of all ranks, got a conversation in {path}; "
                "clear it (kv_cache = None)"
            )


def check_divides(what: str, number: int, ranks: Ranks) -> None:
    """Raises ArgumentError unless the ranks can have equal parts of it."""
    if number % ranks.number:
        raise ArgumentError(
            f"{what}: expected a multiple of the {ranks.number} ranks of the mesh, got {number}; use a number of ranks "
            "that divides it"
        )


def check_heads(path: str, module: Attention, ranks: Ranks) -> None:
    """Raises ArgumentError unless the ranks can have equal numbers of heads."""
    heads, groups, number = module.num_heads, module.num_groups, ranks.number
    if heads % number:
        raise ArgumentError(
            f"{path}: expected num_heads to be a multiple of the {number} ranks of the mesh, got {heads}; use a number "
            "of ranks that divides it"
        )
    if groups % number:
        raise ArgumentError(
            f"{path}: expected num_groups (key/value heads) to be a multiple of the {number} ranks of the mesh, got "
            f"{groups}; use a number of ranks that divides it, or repeat the heads first: to_gqa(model, "
            f"{_next_multiple(groups, heads, number)}), with equal results and a larger cache"
        )


def _next_multiple(groups: int, heads: int, number: int) -> int:
    """The fewest key/value heads that repeat those there are and that the ranks can divide."""
    return next(each for each in range(groups, heads + 1, groups) if each % number == 0 and heads % each == 0)


def check_position(path: str, position: object) -> None:
    """Raises ArgumentError for a position scheme whose heads cannot be cut."""
    if isinstance(position, ScoreBias) and not isinstance(position, ALiBi | RelativePositionBias):
        raise ArgumentError(
            f"{path}: expected ALiBi or RelativePositionBias, which are cut into heads, got {type(position).__name__}"
        )
    if isinstance(position, Rotation) and next(position.parameters(), None) is not None:
        raise ArgumentError(
            f"{path}: expected a rotation without parameters, since gradients would be those of the rank's heads "
            f"alone, got {type(position).__name__}"
        )


def check_no_rules(path: str, module: Attention) -> None:
    """Raises ArgumentError for rules of positions, which may be of all heads."""
    if module.rules is not None:
        raise ArgumentError(
            f"{path}: expected an attention module without mask_rule and score_rule, which see the scores of all heads,"
            " got one with it; set both to None"
        )


def check_no_sink_logits(path: str, module: Attention) -> None:
    """Raises ArgumentError for a learned logit of each head, which is not cut with the heads."""
    if module.sink_logits is not None:
        raise ArgumentError(
            f"{path}: expected an attention module without sink_logits, which no ranks share yet, got one with it; use "
            "pipeline_stages or fully_shard (FSDP2)"
        )


def check_norm(path: str, module: nn.Module, known: Container[type[nn.Module]]) -> None:
    """Raises ArgumentError for a norm of heads with parameters whose gradients cannot be summed over the ranks."""
    if next(module.parameters(), None) is not None and not (type(module) in known and is_plain(module)):
        raise ArgumentError(
            f"{path}: expected a norm of this library or of PyTorch with plain parameters, whose gradients can be "
            f"summed over the ranks, got {type(module).__name__}"
        )


def is_plain(module: nn.Module) -> bool:
    """True if a module computes with plain parameters, and with nothing else."""
    if "forward" in module.__dict__ or module._modules or module._buffers:
        return False
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        return False
    parameters = [each for each in module._parameters.values() if each is not None]
    return all(type(each) is nn.Parameter and each.layout is torch.strided for each in parameters)


def check_plain(path: str, module: nn.Module | None, expected: type[nn.Module]) -> None:
    """Raises ArgumentError unless a module that is cut is one of PyTorch's own, with plain parameters."""
    if type(module) is expected and is_plain(module) and module._parameters.keys() <= {"weight", "bias"}:
        return
    raise ArgumentError(
        f"{path}: expected a plain {expected.__name__}, which can be cut, got {type(module).__name__} with packed, "
        "quantised, parametrized or replaced parts, or options that read a table as a whole; parallelize the model "
        "before these are added, or remove them"
    )


def check_placements(model: nn.Module, placements: Mapping[tuple[int, str], Placement]) -> None:
    """Raises ArgumentError where one parameter stands in several places that ask for different parts of it."""
    found: dict[int, tuple[str, Any]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            here = f"{path}.{name}".lstrip("."), placements.get((id(module), name))
            first = found.setdefault(id(parameter), here)
            if first[1] != here[1]:
                raise ArgumentError(
                    f"model: expected a tied parameter to be cut in one way, got {first[0]} as {first[1] or 'plain'} "
                    f"and {here[0]} as {here[1] or 'plain'}; untie them, or use modules of this library for both"
                )
