"""Signatures for type checkers: a method gets the type of another callable."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def typed_as(_signature: F) -> Callable[[Callable[..., Any]], F]:
    """Decorator that shows type checkers another signature of a method. At run time the method is unchanged.

    PyTorch types `nn.Module.__call__` with any arguments and any result. `@typed_as(forward)` gives it the signature
    of `forward`.
    """

    def unchanged(method: Callable[..., Any]) -> F:
        return method  # type: ignore[return-value]

    return unchanged
