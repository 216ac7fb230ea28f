"""Optional packages: the error message that names the extra of pyproject.toml that installs a missing package."""

import sys
from importlib import import_module
from pathlib import Path

# Modules whose package has another name.
_PACKAGES = {"sklearn": "scikit-learn"}


def install_hint(extra: str) -> str:
    """The command that installs an extra. It names the checkout, because the library is not on a package index."""
    return f'pip install -e ".[{extra}]" in the checkout of modular-attention'


def missing(extra: str, what: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error to raise if `what` (the subject of the sentence) needs the package that `error` reports as missing."""
    module = str(error.name).partition(".")[0]
    package = _PACKAGES.get(module, module.replace("_", "-"))
    return ModuleNotFoundError(f"{what} needs {package}: {install_hint(extra)}", name=error.name)


def require(extra: str, *modules: str) -> None:
    """Imports the modules of a program; if one is missing, exits with status 2 and the message on stderr."""
    try:
        for module in modules:
            import_module(module)
    except ModuleNotFoundError as error:
        sys.stderr.write(f"{missing(extra, Path(sys.argv[0]).name, error)}\n")
        raise SystemExit(2) from None
