"""Places that README.md and CONTRIBUTING.md name: the tree, ways from it of at most three steps, and names in files."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMED = re.compile(r"`([\w.]+)`\s\(`([\w/]+\.py)`\)")
ROW = re.compile(r"^\| (Who|Where|What|How) ([^|]+\?) \| (`[^|]+`) \|", re.MULTILINE)


class Way(NamedTuple):
    """A question, and the steps that lead to its answer: a folder or file of `transformer/` first, a name last."""

    question: str
    steps: list[str]

    @property
    def file(self) -> Path:
        return (ROOT / "transformer").joinpath(*self.steps[:-1])


def ways() -> list[Way]:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## Twelve questions of a newcomer\n")[2]
    return [Way(f"{first} {rest}", re.findall(r"`([^`]+)`", way)) for first, rest, way in ROW.findall(text)]


def names_in(file: Path) -> set[str]:
    return set(defined(ast.parse(file.read_text("utf-8")).body))


def defined(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Names that statements define: functions, classes with their methods, and constants."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from defined(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign):
            yield from (prefix + target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield prefix + node.target.id


def test_the_tree_names_each_file_and_package() -> None:
    tree = (ROOT / "README.md").read_text("utf-8").partition("## Tree\n")[2].partition("\n## ")[0]
    package = ROOT / "transformer"
    names = {path.name for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    names.remove("__init__.py")
    assert {"files.py", "cache"} <= names
    assert [name for name in sorted(names) if not re.search(rf"[`/]{re.escape(name)}[`/]", tree)] == []


def test_no_file_of_the_library_takes_more_than_250_lines() -> None:
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in (ROOT / "transformer").rglob("*.py")}
    assert {str(path.relative_to(ROOT)): number for path, number in lines.items() if number > 250} == {}


def test_there_are_twelve_questions() -> None:
    assert len({way.question for way in ways()}) == 12


@pytest.mark.parametrize("way", ways(), ids=lambda way: way.question)
def test_a_way_leads_from_the_readme_to_a_name_that_exists(way: Way) -> None:
    assert 2 <= len(way.steps) <= 3
    readme = (ROOT / "README.md").read_text("utf-8")
    assert re.search(rf"(?<![\w.]){re.escape(way.steps[0])}(?![\w/])", readme), (
        f"README.md does not name {way.steps[0]}"
    )
    assert way.steps[-1] in names_in(way.file), f"{way.file.name} defines no {way.steps[-1]}"


def test_names_stand_in_the_files_beside_them() -> None:
    named = NAMED.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert ("PositionKind", "transformer/models/parts.py") in named
    assert [(name, file) for name, file in named if name not in names_in(ROOT / file)] == []
