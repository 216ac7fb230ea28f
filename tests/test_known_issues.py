"""Known issues elsewhere: the table in docs/known_issues.md and the docstrings of the tests say the same.

The docstring of a test against a fault of another library begins with `Issues: transformers#32681, mlx-lm#439 #735.`:
its issues, then a full stop. What has no number has a name: ``flash-attn `MHA` ``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "known_issues.md"
ROW = re.compile(r"^\| [^|]+ \| ([^|]+) \| (`[^|]+) \|$", re.MULTILINE)
ISSUES = re.compile(r"Issues: (.+?)\.(?=\s|$)", re.DOTALL)


def issues(text: str) -> Iterator[str]:
    """Each issue of a list such as `transformers#33691 #35350 (both open), flash-attn MHA`, by its whole name."""
    for item in re.sub(r"\([^)]*\)", "", " ".join(text.split())).split(","):
        library, *numbers = item.strip().split("#")
        yield from (f"{library.strip()}#{number.strip()}" for number in numbers)
        if not numbers:
            yield library.strip()


def told_by_the_tests() -> set[tuple[str, str]]:
    """Issue and test, from the docstrings. A file is named from `tests/` on, one of `tests/known_issues/` by itself."""
    found = set()
    for file in sorted(TESTS.rglob("test_*.py")):
        name = file.relative_to(TESTS.parent).as_posix().removeprefix("tests/known_issues/")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                told = ISSUES.match(ast.get_docstring(node) or "")
                found |= {(issue, f"{name}::{node.name}") for issue in issues(told[1])} if told else set()
    return found


def told_by_the_page() -> set[tuple[str, str]]:
    """Issue and test, for each issue of a row and each of its tests."""
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    return {(issue, test) for where, tests in rows for issue in issues(where) for test in re.findall(r"`(.+?)`", tests)}


def test_issues_are_read_one_by_one() -> None:
    text = "transformers#33691 #35350 (drift, twice),\n flash-attn `MHA`, transformers 5.23"
    assert [*issues(text)] == ["transformers#33691", "transformers#35350", "flash-attn `MHA`", "transformers 5.23"]


def test_each_test_of_a_known_issue_names_its_issue() -> None:
    named = {test for _, test in told_by_the_tests()}
    for file in sorted((TESTS / "known_issues").glob("test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert f"{file.name}::{node.name}" in named


def test_the_page_has_every_issue_and_every_issue_its_tests() -> None:
    page, tests = told_by_the_page(), told_by_the_tests()
    assert {issue for issue, _ in page} == {issue for issue, _ in tests}
    assert {test for _, test in page} == {test for _, test in tests}


def test_a_row_names_only_tests_of_its_issues() -> None:
    """Each test of a row holds for one of its issues at least, and each issue of a row has a test there."""
    tests = told_by_the_tests()
    for where, cell in ROW.findall(PAGE.read_text(encoding="utf-8")):
        own, named = {*issues(where)}, {*re.findall(r"`(.+?)`", cell)}
        assert {test for issue, test in tests if issue in own} == named
