"""Deprecated names: old names of public things, kept for one release, each use of which warns."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any


def old_names(package: str, names: Mapping[str, tuple[str, Any]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package (PEP 562) that still answers to old names: old name to (new name, object).

    Each use gives a DeprecationWarning. Raises AttributeError for every other name.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        new, found = names[name]
        warn_old(f"{package}.{name}", f"{package}.{new}")
        return found

    return __getattr__


def warn_old(old: str, new: str) -> None:
    """Warns, at the caller's caller, that `old` is now called `new`."""
    warnings.warn(f"{old} is now {new}; the old name goes away in 0.3.0", DeprecationWarning, stacklevel=3)
