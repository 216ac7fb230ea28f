"""Signatures of functions that are those of another callable, for type checkers and for `help()`."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import InitVar
from functools import wraps
from typing import Any, Concatenate, TypeVar

from typing_extensions import ParamSpec

C = TypeVar("C")
P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


def typed_as(_signature: F) -> Callable[[Callable[..., Any]], F]:
    """Decorator that shows type checkers another signature of a method. At run time the method is unchanged.

    PyTorch types `nn.Module.__call__` with any arguments and any result. `@typed_as(forward)` gives it the signature
    of `forward`.
    """

    def unchanged(method: Callable[..., Any]) -> F:
        return method  # type: ignore[return-value]

    return unchanged


def arguments_of(given: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Decorates a function that takes the arguments of `given`, a dataclass: with each name, type and default."""

    def described(function: Callable[..., R]) -> Callable[P, R]:
        _describe(function, list(_parameters(given)))
        return function

    return described


def configured_by(config: Callable[P, C]) -> Callable[[Callable[[Any, C], None]], Callable[Concatenate[Any, P], None]]:
    """Decorates an `__init__` that takes a configuration: it is called with the arguments of `config`, a dataclass.

    So a constructor has every option of its configuration, with its type and default, and lists none of them again.
    """

    def configured(init: Callable[[Any, C], None]) -> Callable[Concatenate[Any, P], None]:
        @wraps(init)
        def __init__(self: Any, /, *arguments: P.args, **options: P.kwargs) -> None:  # noqa: N807
            init(self, config(*arguments, **options))

        _describe(__init__, [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *_parameters(config)])
        return __init__

    return configured


def _parameters(given: Callable[..., Any]) -> Iterator[inspect.Parameter]:
    for parameter in inspect.signature(given).parameters.values():
        kind = parameter.annotation
        yield parameter.replace(annotation=kind.type if isinstance(kind, InitVar) else kind)


def _describe(function: Callable[..., Any], parameters: list[inspect.Parameter]) -> None:
    returned = inspect.signature(function).return_annotation
    annotations = {each.name: each.annotation for each in parameters if each.annotation is not each.empty}
    function.__annotations__ = annotations | {"return": returned}
    function.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
