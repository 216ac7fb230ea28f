"""Tied weights: one parameter in several places of a model, kept as one when PyTorch replaces it.

PyTorch replaces a parameter in each place separately when it moves to or from the meta device (`to_empty`), and when a
state dict is assigned. Each place would then be trained separately.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..errors import ArgumentError, ConfigurationError


class TiedModel(nn.Module):
    """A model whose tied parameters stay tied in `to_empty`, `to` and `load_state_dict`, also with `assign=True`.

    A state dict needs one entry of those that name a tied parameter. Raises ArgumentError, before anything is loaded,
    where several entries differ.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        shared = [places for places in places_of(self).values() if len(places) > 1]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for (first, first_kind, _), *others in shared:
            for module, kind, _ in others:
                module._parameters[kind] = first._parameters[first_kind]
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module, but one entry of a tied parameter is enough, also with `strict`.

        Without `strict` the others are listed as missing, which loaders of files without duplicates expect
        (`safetensors.torch.load_model`).
        """
        if strict:
            completed = OrderedDict(state_dict)
            for names, given in _tied_entries(self, state_dict, ""):
                for name in names:
                    completed.setdefault(name, state_dict[given[0]])
            if metadata := getattr(state_dict, "_metadata", None):
                completed._metadata = metadata  # type: ignore[attr-defined]  # PyTorch keeps it as an attribute
            state_dict = completed
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        for names, given in _tied_entries(self, state_dict, prefix):
            _check_equal(given, [state_dict[name] for name in given])
            if local_metadata.get("assign_to_params_buffers", False):
                # An entry that is a parameter is taken as it is, so all places get the same one. PyTorch gives a copy
                # of the caller's dict, and reads the entries of submodules after this call.
                value = state_dict[given[0]]
                value = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
                state_dict.update(dict.fromkeys(names, value))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)


def tie(module: nn.Module, source: nn.Module, path: str) -> None:
    """Makes the `weight` of `module`, at `path`, the same parameter as that of `source`.

    Raises ConfigurationError where one of them has no such parameter of its own, or their shapes differ.
    """
    if getattr(module, "weight", None) is getattr(source, "weight", module):
        return  # also where an adapter exposes the weight that it wraps
    ours, theirs = module._parameters.get("weight"), source._parameters.get("weight")
    if ours is None or theirs is None or ours.shape != theirs.shape:
        raise ConfigurationError(
            f"{path}: expected a module with a weight of the embedding's shape to tie, got {type(module).__name__} and "
            f"{type(source).__name__}; tie before a wrapper or a parametrization replaces it"
        )
    # Not by attribute: what intercepts the registration of parameters (accelerate's init_empty_weights) copies there.
    module._parameters["weight"] = theirs


def places_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str, str]]]:
    """Where each parameter is, by its id: every module that has it, its name there, and its path in the model."""
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for kind, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, kind, f"{path}.{kind}" if path else kind))
    return places


def _tied_entries(
    model: nn.Module, state_dict: Mapping[str, Any], prefix: str
) -> Iterator[tuple[list[str], list[str]]]:
    """For each tied parameter that a state dict has: the names of all its entries, and of those that are there."""
    for places in places_of(model).values():
        names = [f"{prefix}{path}" for _, _, path in places]
        given = [name for name in names if name in state_dict]
        if len(names) > 1 and given:
            yield names, given


def _check_equal(names: list[str], values: list[Any]) -> None:
    for name, value in zip(names[1:], values[1:], strict=True):
        if not _is_equal(values[0], value):
            raise ArgumentError(
                f"state_dict: expected {names[0]} and {name} to be equal, as they are one tied parameter of the model, "
                "got different tensors; leave one of them out, or build the model with tied_embeddings=False "
                "(shared_embeddings=False)"
            )


def _is_equal(first: Any, second: Any) -> bool:
    """True if two entries are one tensor or equal; meta tensors and tensor subclasses are not compared."""
    if first is second or not (_is_readable(first) and _is_readable(second)):
        return True
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    second = second.to(first.device)
    return torch.equal(first, second) or bool(((first == second) | ((first != first) & (second != second))).all())


def _is_readable(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter) and not value.is_meta
