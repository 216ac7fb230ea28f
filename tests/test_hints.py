"""Annotations of the package: `typing.get_type_hints` resolves them, as tools that build forms and documents need."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_type_hints

import transformer

if TYPE_CHECKING:
    from collections.abc import Sized


NEEDS_VLLM = "transformer.engines.vllm_model"
"""The module that vLLM imports, in an environment of its own."""


def modules() -> Iterator[ModuleType]:
    yield transformer
    for found in pkgutil.walk_packages(transformer.__path__, "transformer."):
        if found.name != NEEDS_VLLM:
            yield importlib.import_module(found.name)


def public_classes() -> dict[str, type]:
    """Every class with a public name, by the module that defines it."""
    return {
        f"{module.__name__}.{name}": value
        for module in modules()
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def exported() -> dict[str, Any]:
    """Every class and function that a package exports, by the first package that does so."""
    found: dict[Any, str] = {}
    for module in modules():
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                found.setdefault(value, f"{module.__name__}.{name}")
    return {name: value for value, name in found.items()}


def unresolved(value: Any) -> list[str]:
    """Methods of an exported class that the library defines, or the function itself, whose hints do not resolve."""
    if not inspect.isclass(value):
        return failures({value.__qualname__: value})
    own = [each for each in value.__mro__ if each.__module__.partition(".")[0] == "transformer"]
    return failures(
        {
            f"{each.__qualname__}.{name}": inspect.unwrap(getattr(method, "__func__", method))
            for each in own
            for name, method in vars(each).items()
            if name == "__init__" or not name.startswith("_")
        }
    )


def failures(functions: dict[str, Any]) -> list[str]:
    found = []
    for name, function in functions.items():
        # A descriptor, such as that of an attribute, counts as a routine, and is none.
        if inspect.isroutine(function) and callable(function):
            try:
                get_type_hints(function)
            except NameError as error:
                found.append(f"{name}: {error}")
    return found


def test_the_hints_of_every_constructor_resolve() -> None:
    classes = public_classes()
    assert {"transformer.attention.mha.MultiHeadAttention", "transformer.blocks.stack.BlockStack"} <= classes.keys()
    assert failures({name: each.__init__ for name, each in classes.items()}) == []


def test_the_hints_of_what_is_exported_resolve() -> None:
    values = exported()
    assert {"transformer.KVCache", "transformer.generation.generate"} <= values.keys()
    assert [failure for value in values.values() for failure in unresolved(value)] == []


class Unresolved:
    """A class as the library must have none: a name that only type checkers import."""

    def __init__(self, size: "Sized") -> None: ...

    @classmethod
    def of(cls, size: "Sized") -> None: ...


def test_a_hint_that_does_not_resolve_is_found() -> None:
    missing = "name 'Sized' is not defined"
    functions = {"__init__": Unresolved.__init__, "of": Unresolved.of}
    assert failures(functions) == [f"__init__: {missing}", f"of: {missing}"]
