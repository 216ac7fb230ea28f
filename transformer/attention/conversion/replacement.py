"""Copy of a model with some of its modules replaced, in which shared parts stay shared."""

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ...errors import ArgumentError, ConfigurationError

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Replacement(Generic[ModuleT]):
    """Replacements, in a copy of `model`, of each of its modules of `kind`.

    `copy.deepcopy` keeps a memo of what it has copied already, and takes an entry found there as the copy. Written into
    the memo beforehand, a replacement is used wherever the original was, and one position scheme or weight of
    many layers is copied once. Nothing of the given model is changed at any time.

    Raises ArgumentError where `model` is no module, or has none of `kind`.
    """

    def __init__(self, model: nn.Module, kind: type[ModuleT]) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"module: expected a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.paths: dict[ModuleT, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, kind):
                self.paths.setdefault(module, []).append(path)
        if not self.paths:
            raise ArgumentError(
                f"module: expected a {kind.__module__}.{kind.__name__}, or a model with one in it, "
                f"got {type(model).__name__} without any"
            )
        self.memo: dict[int, Any] = {}
        self._made: dict[Hashable, tuple[nn.Parameter, ...]] = {}
        self._uses: dict[int, Hashable] = {}
        self._names: dict[int, set[str]] = {}

    def name(self, module: ModuleT, attribute: str = "") -> str:
        """The path of a module, or of an attribute of it, in the model; for messages."""
        return _joined(self.paths[module][0], attribute) or "module"

    def put(self, original: nn.Module | nn.Parameter, replacement: nn.Module | nn.Parameter) -> None:
        """Registers the replacement of `original`."""
        self.memo[id(original)] = replacement

    def copied(self, piece: Any) -> Any:
        """The one copy of a piece of the model."""
        return copy.deepcopy(piece, self.memo)

    def remade(
        self,
        module: ModuleT,
        names: Sequence[str],
        how: Hashable,
        make: Callable[..., Sequence[Tensor]],
    ) -> tuple[nn.Parameter, ...]:
        """The tensors that `make` gives for the parameters of `module` with these names, as parameters of the copy.

        Asked again for the same parameters and `how`, it gives the same ones: what was tied stays tied. Raises
        ConfigurationError where one of them is tied to a parameter that is made anew in another way.
        """
        sources = [module.get_parameter(name) for name in names]
        key = (how, *map(id, sources))
        for index, (name, source) in enumerate(zip(names, sources, strict=True)):
            if self._uses.setdefault(id(source), (key, index)) != (key, index):
                raise ConfigurationError(_tied(self.name(module, name), min(self._names[id(source)])))
            self._names.setdefault(id(source), set()).update(_joined(path, name) for path in self.paths[module])
        if key not in self._made:
            tensors = make(*sources)
            self._made[key] = tuple(nn.Parameter(tensor.clone(), sources[0].requires_grad) for tensor in tensors)
        return self._made[key]

    def finished(self) -> nn.Module:
        """The copy of the model, in its training mode, with every replacement in place.

        Raises ConfigurationError where a parameter that is made anew is also used in another place.
        """
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names = self._names.get(id(parameter))
            if names is not None and name not in names:
                raise ConfigurationError(_tied(name, min(names)))
        finished: nn.Module = self.copied(self.model)
        return finished


def unhooked(module: nn.Module) -> bool:
    """Whether calling a module runs its own class's forward and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def plain_linear(module: nn.Module) -> bool:
    """True if a module is its weight and bias and no more, as a subclass in torch's attention also is."""
    return (
        type(module) in (nn.Linear, NonDynamicallyQuantizableLinear)
        and unhooked(module)
        and module._parameters.keys() == {"weight", "bias"}
        and all(type(parameter) is nn.Parameter for parameter in module.parameters())
        and next(module.children(), None) is None
    )


def _joined(path: str, attribute: str) -> str:
    return ".".join(part for part in (path, attribute) if part)


def _tied(name: str, other: str) -> str:
    return (
        f"{name}: expected a parameter of its own, got one tied to {other}, where its numbers are put "
        "together in another way; untie them first, giving one of them a clone"
    )
