"""Optional packages: the one sentence that says which extra of pyproject.toml installs a missing one."""

import sys
from importlib import import_module
from pathlib import Path

# Packages that are not named as their module.
_PACKAGES = {"sklearn": "scikit-learn"}


def install_hint(extra: str) -> str:
    """The command that installs an extra. It names the checkout, because the library is on no package index."""
    return f'pip install -e ".[{extra}]" in the checkout of modular-attention'


def missing(extra: str, what: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error to raise where `what` (the subject of the sentence) needs a package that `error` did not find."""
    module = str(error.name).partition(".")[0]
    package = _PACKAGES.get(module, module.replace("_", "-"))
    return ModuleNotFoundError(f"{what} needs {package}: {install_hint(extra)}", name=error.name)


def require(extra: str, *modules: str) -> None:
    """For programs: imports the modules; where one is missing, ends with status 2 and the sentence on stderr."""
    try:
        for module in modules:
            import_module(module)
    except ModuleNotFoundError as error:
        sys.stderr.write(f"{missing(extra, Path(sys.argv[0]).name, error)}\n")
        raise SystemExit(2) from None
