"""Processes that load or save one model: this one alone, or ranks that each have a part of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from .arguments import checked_device
from .names import Region

T = TypeVar("T")


class Processes(ABC):
    """The processes of a model. Each runs the same methods in the same order."""

    @abstractmethod
    def agreed(self, work: Callable[[], T]) -> T:
        """The result of `work`, which each process runs; if it raises in one, it raises in all."""

    @abstractmethod
    def first(self, work: Callable[[], object]) -> None:
        """Runs `work` in the first process alone; if it raises there, it raises in all."""

    @abstractmethod
    def device(self, device: torch.device | str | None) -> torch.device:
        """The device of this process's weights. Raises as `checked_device` does."""

    @abstractmethod
    def share(self, model: nn.Module) -> None:
        """Gives this process its part of an empty model."""

    @abstractmethod
    def region(self, parameter: Tensor) -> Region:
        """The part of an empty model's parameter that this process has."""

    @abstractmethod
    def filled(self, parameter: Tensor, tensor: Tensor) -> nn.Parameter:
        """The parameter with this process's part of it."""

    @abstractmethod
    def whole_model(self, model: nn.Module) -> nn.Module:
        """The same parameters in the modules of one process, for questions of classes and options."""

    @abstractmethod
    def own(self, parameter: nn.Parameter) -> Tensor:
        """This process's part of a parameter."""

    @abstractmethod
    def gathered(self, parameter: Tensor) -> Tensor | None:
        """The whole tensor of a parameter, in the first process; None in the others."""


class OneProcess(Processes):
    """A process that has all of a model."""

    def agreed(self, work: Callable[[], T]) -> T:
        """The result of `work`."""
        return work()

    def first(self, work: Callable[[], object]) -> None:
        """Runs `work`."""
        work()

    def device(self, device: torch.device | str | None) -> torch.device:
        """The device, by default PyTorch's default device."""
        return checked_device(device)

    def share(self, model: nn.Module) -> None:
        """Leaves the model as it is."""

    def region(self, parameter: Tensor) -> Region:
        """All of the parameter."""
        return tuple(slice(0, size) for size in parameter.shape)

    def filled(self, _parameter: Tensor, tensor: Tensor) -> nn.Parameter:
        """A parameter of this tensor."""
        return nn.Parameter(tensor)

    def whole_model(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model

    def own(self, parameter: nn.Parameter) -> Tensor:
        """Its tensor."""
        return parameter.data

    def gathered(self, parameter: Tensor) -> Tensor:
        """Its tensor."""
        return parameter.detach()
