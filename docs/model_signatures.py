"""Signatures of models in the API reference: the arguments of their configurations, as callers give them.

An extension of griffe, which reads the package's source for mkdocstrings. Source has `__init__(self, config)` below the
decorator `configured_by`.
"""

from collections.abc import Iterator
from typing import Any

from griffe import Class, DataclassesExtension, Extension, Module

DECORATOR = "transformer.signatures.configured_by"


class ModelSignatures(Extension):
    """Gives each decorated constructor the parameters of its configuration."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Changes the package once it is read."""
        # Their constructors are not in the source either.
        DataclassesExtension().on_package(pkg=pkg)
        for each in classes(pkg):
            init = each.members.get("__init__")
            if init is not None and any(made.callable_path == DECORATOR for made in init.decorators):
                path = init.parameters["config"].annotation.canonical_path
                init.parameters = pkg[path.removeprefix(f"{pkg.path}.")].members["__init__"].parameters


def classes(module: Module) -> Iterator[Class]:
    """Every class that is defined in a module, or in one below it."""
    for member in module.members.values():
        if not member.is_alias and member.is_module:
            yield from classes(member)
        elif not member.is_alias and member.is_class:
            yield member
