"""Initialisation of all child modules, by PyTorch's convention of `reset_parameters`.

A model on the meta device gets its weights by `model.to_empty(device=...)` and then `model.reset_parameters()`.
"""

from collections.abc import Iterator

from torch import nn

from .errors import ConfigurationError


def reset_children(module: nn.Module) -> None:
    """Calls `reset_parameters` of each child, and of the children of a child that has no such method.

    Raises ConfigurationError, before anything changes, for a module with parameters of its own that has no
    `reset_parameters`.
    """
    for child in list(_resettable(module, "")):
        child.reset_parameters()  # type: ignore[operator]  # checked by _resettable


def reset_module(module: nn.Module) -> None:
    """Calls `reset_parameters` of a module, or `reset_children` if it has no such method."""
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
    else:
        reset_children(module)


def _resettable(module: nn.Module, path: str) -> Iterator[nn.Module]:
    for name, child in module.named_children():
        if callable(getattr(child, "reset_parameters", None)):
            yield child
            continue
        if next(child.parameters(recurse=False), None) is not None:
            raise ConfigurationError(
                f"{path}{name}: expected a module with reset_parameters(), as it has parameters of its own, "
                f"got {type(child).__name__}; give it that method"
            )
        yield from _resettable(child, f"{path}{name}.")
