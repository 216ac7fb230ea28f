"""Ranks that load or save a model which they share: each reads its part of the files, and the first one writes them."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..errors import DeviceError
from ..parallel import own_part, parallelize
from ..parallel.checks import check_mesh
from ..parallel.parts import with_own_part
from ..parallel.ranks import Ranks
from ..parallel.whole import whole_model
from .arguments import checked_device
from .names import Region
from .processes import OneProcess, Processes

T = TypeVar("T")


class RanksOfMesh(Processes):
    """The ranks of a one-dimensional mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        check_mesh(mesh)
        self._mesh, self._ranks = mesh, Ranks(mesh)

    def agreed(self, work: Callable[[], T]) -> T:
        """The result of `work`; an error of another rank is a RanksError with its text."""
        return self._ranks.agreed(work)

    def first(self, work: Callable[[], object]) -> None:
        """Runs `work` on rank 0."""
        self.agreed(work if self._ranks.rank == 0 else lambda: None)

    def device(self, device: torch.device | str | None) -> torch.device:
        """The device, by default the current one of the mesh's type. Raises DeviceError for another type."""
        kind = self._mesh.device_type
        if device is None:
            index = None if kind == "cpu" else torch.get_device_module(kind).current_device()
            return checked_device(torch.device(kind) if index is None else torch.device(kind, index))
        where = checked_device(device)
        if where.type != kind:
            raise DeviceError(f"device: expected one of the mesh, of type {kind}, got {where}; leave it out")
        return where

    def share(self, model: nn.Module) -> None:
        """Makes the empty model parallel, so that its parameters say which part a rank has."""
        parallelize(model, self._mesh)

    def region(self, parameter: Tensor) -> Region:
        """This rank's part of a parameter."""
        return own_part(parameter)

    def filled(self, parameter: Tensor, tensor: Tensor) -> nn.Parameter:
        """The parameter with this rank's part of it."""
        return with_own_part(parameter, tensor)

    def whole_model(self, model: nn.Module) -> nn.Module:
        """The parameters in the modules that `parallelize` was given."""
        return whole_model(model)

    def own(self, parameter: nn.Parameter) -> Tensor:
        """This rank's tensor."""
        tensor = parameter.data
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def gathered(self, parameter: Tensor) -> Tensor | None:
        """The tensor of all ranks, on rank 0; the others send their parts."""
        tensor = parameter.detach()
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return whole if self._ranks.rank == 0 else None


def processes_of(model: nn.Module) -> Processes:
    """The ranks of a model that `parallelize` changed; this process alone for other models."""
    meshes = {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}
    return RanksOfMesh(meshes.pop()) if len(meshes) == 1 else OneProcess()
