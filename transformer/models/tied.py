"""Tied weights: one parameter in several places of a model, which stays one whatever replaces it.

PyTorch replaces a parameter place by place where it moves to or from the meta device (`to_empty`), and where a state
dict is assigned; each place would then train on its own.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ConfigurationError

if TYPE_CHECKING:
    from typing_extensions import Self


class TiedModel(nn.Module):
    """A model that keeps one parameter one: in `to_empty` and `to`, and in `load_state_dict`, assigned or copied.

    A state dict needs one entry of those that name a tied parameter. Raises ArgumentError, before anything is loaded,
    where several entries differ.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        shared = [places for places in _places(self).values() if len(places) > 1]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for (first, first_kind, _), *others in shared:
            for module, kind, _ in others:
                module._parameters[kind] = first._parameters[first_kind]
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        # PyTorch gives a copy of the caller's dict, and reads the entries of submodules after this call.
        assigned = local_metadata.get("assign_to_params_buffers", False)
        for places in _places(self).values():
            names = [f"{prefix}{path}" for _, _, path in places]
            given = [name for name in names if name in state_dict]
            if len(names) == 1 or not given:
                continue
            _check_equal(given, [state_dict[name] for name in given])
            value = state_dict[given[0]]
            if assigned and not isinstance(value, nn.Parameter):
                # An entry that is a parameter already is taken as it is, so that all places get the same one.
                value = nn.Parameter(value, requires_grad=False)
            state_dict.update(dict.fromkeys(names, value))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)


def tie(module: nn.Module, source: nn.Module, path: str) -> None:
    """Makes the `weight` of `module`, which stands at `path`, the very parameter that `source` has.

    Raises ConfigurationError where one of them has no such parameter of its own, or their shapes differ.
    """
    if getattr(module, "weight", None) is getattr(source, "weight", module):
        return  # also through an adapter, which shows the weight that it wraps
    ours, theirs = module._parameters.get("weight"), source._parameters.get("weight")
    if ours is None or theirs is None or ours.shape != theirs.shape:
        raise ConfigurationError(
            f"{path}: expected a module with a weight of the embedding's shape to tie, got {type(module).__name__} and "
            f"{type(source).__name__}; tie before a wrapper or a parametrization replaces it"
        )
    # Not by attribute: what intercepts the registration of parameters (accelerate's init_empty_weights) copies there.
    module._parameters["weight"] = theirs


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str, str]]]:
    """Where each parameter is, by its id: every module that has it, its name there, and its path in the model."""
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for kind, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, kind, f"{path}.{kind}" if path else kind))
    return places


def _check_equal(names: list[str], values: list[Any]) -> None:
    for name, value in zip(names[1:], values[1:], strict=True):
        if not _is_equal(values[0], value):
            raise ArgumentError(
                f"state_dict: expected {names[0]} and {name} to be equal, as they are one tied parameter of the model, "
                "got different tensors; leave one of them out, or build the model with tied_embeddings=False "
                "(shared_embeddings=False)"
            )


def _is_equal(first: Any, second: Any) -> bool:
    """True if two entries are one tensor or equal; meta tensors and tensor subclasses are not looked at."""
    if first is second or not (_is_readable(first) and _is_readable(second)):
        return True
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    second = second.to(first.device)
    return torch.equal(first, second) or bool(((first == second) | ((first != first) & (second != second))).all())


def _is_readable(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter) and not value.is_meta
