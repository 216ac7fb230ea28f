"""Error message for a missing package, and installation hints that work in a checkout."""

import re
from pathlib import Path

import pytest

from transformer.extras import install_hint, missing

ROOT = Path(__file__).resolve().parent.parent
# By hand, since Python 3.10 has no tomllib.
TABLE = (ROOT / "pyproject.toml").read_text("utf-8").partition("[project.optional-dependencies]")[2].partition("\n[")[0]
EXTRAS = re.findall(r"^(\w+) = \[", TABLE, re.MULTILINE)


def texts() -> list[Path]:
    folders = ("transformer", "examples", "benchmarks", "docs")
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".md"}]
    return [*inside, *ROOT.glob("*.md")]


def extras_named(text: str) -> list[str]:
    """The extras in commands of pip, and in calls of the functions that say such a command."""
    in_commands = re.findall(r"pip install [^\n`]*\[([\w,]+)\]", text)
    in_calls = re.findall(r"""(?<![.\w])(?:missing|install_hint|require)\(["'](\w+)["']""", text)
    return [name for names in in_commands for name in names.split(",")] + in_calls


@pytest.mark.parametrize(
    ("name", "package"),
    [("safetensors", "safetensors"), ("matplotlib.figure", "matplotlib"), ("sklearn.datasets", "scikit-learn")],
)
def test_the_sentence_names_what_needs_which_package_and_how_it_is_installed(name, package):
    error = missing("files", "saving a conversation", ModuleNotFoundError("no", name=name))
    assert str(error) == f"saving a conversation needs {package}: {install_hint('files')}"
    assert error.name == name
    assert install_hint("files").startswith('pip install -e ".[files]"')


def test_every_hint_names_an_extra_that_there_is():
    named = [name for path in texts() for name in extras_named(path.read_text("utf-8"))]
    assert {"files", "checkpoints", "hub", "examples", "test"} <= set(named)
    assert set(named) <= set(EXTRAS)


def test_no_hint_asks_an_index_for_the_library():
    """The library is on no package index: `pip install modular-attention` finds nothing, or another project."""
    asking = re.compile(r"pip install ['\"]?modular-attention")
    assert [path.name for path in texts() if asking.search(path.read_text("utf-8"))] == []
