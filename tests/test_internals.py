"""Private names of the library: tests use them through `tests/internals.py` alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
FOREIGN = {"_parameters": "torch.nn.Module", "_tokenizer": "tokenizers of transformers"}
"""Private names of other libraries that tests read, and that the library has too: name to owner."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined_in(tree: ast.AST) -> Iterator[str]:
    """Functions, classes, variables and attributes that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def used_in(tree: ast.AST) -> Iterator[str]:
    """Attributes of objects other than `self`, and imported names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_no_other_test_uses_a_private_name() -> None:
    library = (TESTS.parent / "transformer").rglob("*.py")
    private = {name for path in library for name in defined_in(parsed(path)) if is_private(name)} - {*FOREIGN}
    found = {str(path.relative_to(TESTS)): private & {*used_in(parsed(path))} for path in TESTS.rglob("*.py")}
    assert len(found.pop("internals.py")) > 5
    assert {path: names for path, names in found.items() if names} == {}
