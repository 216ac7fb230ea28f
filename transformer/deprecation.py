"""Deprecated names: old public names that stay for one release and warn at each use."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any


def old_names(package: str, names: Mapping[str, tuple[str, Any]]) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562) that accepts old names. `names`: old name to (new name, object).

    Each use gives a DeprecationWarning. Raises AttributeError for all other names.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        new, found = names[name]
        warn_old(f"{package}.{name}", f"{package}.{new}")
        return found

    return __getattr__


def warn_old(old: str, new: str) -> None:
    """Warns, at the caller's caller, that `old` was renamed to `new`."""
    warnings.warn(f"{old} is now {new}; the old name goes away in 0.3.0", DeprecationWarning, stacklevel=3)
