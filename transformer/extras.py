"""Optional packages: the one sentence that says which extra of pyproject.toml installs a missing one."""


def install_hint(extra: str) -> str:
    """The command that installs an extra. It names the checkout, because the library is on no package index."""
    return f'pip install -e ".[{extra}]" in the checkout of modular-attention'


def missing(extra: str, what: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error to raise where `what` (the subject of the sentence) needs a package that `error` did not find."""
    package = (error.name or "a package").partition(".")[0]
    return ModuleNotFoundError(f"{what} needs {package}: {install_hint(extra)}", name=error.name)
