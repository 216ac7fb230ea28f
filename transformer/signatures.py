"""Signatures for type checkers: a method that is typed as another callable is."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def typed_as(_signature: F) -> Callable[[Callable[..., Any]], F]:
    """Decorates a method that type checkers shall read with another signature; when run, the method is as it was.

    PyTorch declares `nn.Module.__call__` to take and give anything. `@typed_as(forward)` gives it forward's signature.
    """

    def unchanged(method: Callable[..., Any]) -> F:
        return method  # type: ignore[return-value]

    return unchanged
