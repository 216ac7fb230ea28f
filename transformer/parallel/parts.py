"""Parameters of which a rank has a part: DTensors of the whole shape, and the tensor of this rank inside."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..errors import ArgumentError
from ..plain import HasPlainWeights
from .ranks import Ranks

_local = getattr(DTensor, "_local_tensor", None)
"""PyTorch's own attribute: the public way takes 5 microseconds for each parameter. None: it has another name."""


def local(parameter: Tensor | None) -> Tensor | None:
    """This rank's tensor of a DTensor; while gradients are recorded they go back to the parameter."""
    if parameter is None:
        return None
    if _local is None or torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
        return parameter.to_local()  # type: ignore[attr-defined,no-any-return]
    return _local.__get__(parameter)  # type: ignore[no-any-return]


class LocalWeights(nn.Module, HasPlainWeights):
    """A module that computes with this rank's tensors of its parameters."""

    def plain_weights(self) -> tuple[Tensor, ...]:
        """This rank's tensors."""
        tensors = (local(each) for each in self._parameters.values())
        return tuple(each for each in tensors if each is not None)


class Reader(Protocol):
    """How a module reads its parameters."""

    def __call__(self, parameter: Tensor | None, /) -> Tensor | None: ...


class SumsGradients:
    """Reads a parameter that is whole on each rank and applied to the rank's share: its gradients are summed."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __call__(self, parameter: Tensor | None) -> Tensor | None:
        tensor = local(parameter)
        return None if tensor is None else self.ranks.copied(tensor)


def distributed(parameter: nn.Parameter, placement: Placement, ranks: Ranks) -> nn.Parameter:
    """A parameter of the same shape and numbers, of which this rank has the part that the placement says.

    A part has memory of its own, so that the whole can be freed; what is whole on each rank stays where it is.
    """
    tensor = parameter.detach()
    if isinstance(placement, Shard):
        part = ranks.share(tensor.shape[placement.dim])
        tensor = tensor.narrow(placement.dim, part.start, len(part)).clone(memory_format=torch.contiguous_format)
    return _of_part(tensor, parameter, ranks.mesh, [placement])


def with_own_part(parameter: Tensor, tensor: Tensor) -> nn.Parameter:
    """A parameter like this one, of which this rank has `tensor`, on any device of the mesh's type and in any dtype."""
    if not isinstance(parameter, DTensor):
        return nn.Parameter(tensor, parameter.requires_grad)
    return _of_part(tensor, parameter, parameter.device_mesh, parameter.placements)


def _of_part(tensor: Tensor, whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> nn.Parameter:
    shared = DTensor.from_local(tensor, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
    return nn.Parameter(shared, whole.requires_grad)


def own_part(parameter: Tensor) -> tuple[slice, ...]:
    """The part of a whole tensor that this rank has of a parameter of a parallel model, as an index into the whole.

    Such as `whole[own_part(parameter)]` to fill `parameter.to_local()` of a model that was parallelized on the meta
    device. Raises ArgumentError for a parameter that is also sharded over another dimension of a mesh.
    """
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    if parameter.device_mesh.ndim != 1:
        raise ArgumentError(
            f"parameter: expected one of a parallel model, on a mesh of one dimension, got one on a mesh of "
            f"{parameter.device_mesh.ndim}; call own_part before fully_shard, or load by distributed checkpoints"
        )
    own = [range(size) for size in parameter.shape]
    for placement in parameter.placements:
        if isinstance(placement, Shard):
            own[placement.dim] = Ranks(parameter.device_mesh).share(parameter.shape[placement.dim])
    return tuple(slice(each.start, each.stop) for each in own)


WHOLE, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)
