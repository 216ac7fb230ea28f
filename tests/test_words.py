"""Words of the package, its tests and its documents: no term that the field does not use.

Each module has a docstring that begins with a noun.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "transformer").rglob("*.py"))

# The fixtures are of older releases, this file has the terms in a list, and CHANGELOG.md names what was renamed.
EXCLUDED = {*(ROOT / "tests" / "fixtures").rglob("*.py"), Path(__file__).resolve(), ROOT / "CHANGELOG.md"}
OTHERS = {*(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")} - EXCLUDED
TEXTS = [*FILES, *sorted(OTHERS)]
MODULES = [path for path in TEXTS if path.suffix == ".py" and (path in FILES or path.name != "__init__.py")]
IDS = [str(path.relative_to(ROOT)) for path in MODULES]

OPENINGS = re.compile(r"(what|how|whatever|all|where|when|whether|which|who|whoever|that|reads|writes|the one)\b", re.I)
"""Beginnings of a module docstring that do not name the thing in the module."""

# Each term with the one to use instead. `ticket` is found in `_ticket`, not in `tickets`; `let go` also in `let_go`.
TERMS = {
    "helds": "cached_lengths",
    "gained": "new_lengths",
    "fedbyhand": "StandaloneCache",
    "museum": "known_issues",
    "sees_nothing": "fully_masked",
    "blind": "fully_masked",
    "unturned": "unrotated",
    "in_turns": "tiled",
    "tip": "latest state",
    "ticket": "lease",
    "witness": "fingerprint",
    "let go": "evicted",
    "lets go": "evicts",
    "left behind": "evicted",
    "dice": "random generator",
    "talk": "chat",
    "converse": "chat",
    "lie side by side": "are contiguous",
    "at the door": "before the projections",
    "remember": "cache",
    "remembers": "caches",
    "remembered": "cached",
    "whoever": "the caller",
    "somebody": "other code",
    "nobody": "no caller",
    "goes by": "uses",
    "had with": "made with",
}

PENDING = {
    # `helds` and `gained` are deprecated public names, which go away in 0.3.0.
    "transformer/cache": {"helds", "gained"},
}
"""Terms that files of these folders still contain. A term may be removed here, never added."""

PENDING_DOCSTRINGS: set[str] = set()
"""Modules whose docstring does not begin with a noun yet. A module may be removed here, never added."""


def folder_of(path: Path) -> str:
    """The folder that a file is in, from the root on; at most two names deep."""
    return "/".join(path.relative_to(ROOT).parent.parts[:2])


def terms_in(text: str) -> set[str]:
    """The terms in a text, also across the end of a line, and in names, whose words have underscores or capitals."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", text)
    text = " ".join(f"{text} {words}".lower().split())
    return {term for term in TERMS if re.search(rf"(?<![a-z]){re.escape(term)}(?![a-z])", text)}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*IDS} - PENDING_DOCSTRINGS))
def test_a_module_docstring_begins_with_a_noun(name: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8")))
    assert docstring, "a module without a docstring"
    assert not OPENINGS.match(docstring), f"begin with the thing in this module, not with {docstring.split()[0]!r}"


@pytest.mark.slow
@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_text_uses_the_terms_of_the_field(path: Path) -> None:
    found = terms_in(path.read_text(encoding="utf-8")) - PENDING.get(folder_of(path), set())
    assert not found, {term: f"say {TERMS[term]}" for term in found}


def test_pending_terms_are_still_there() -> None:
    """The list shrinks: each of its terms is in the folder."""
    for folder, terms in PENDING.items():
        text = " ".join(path.read_text(encoding="utf-8") for path in TEXTS if folder_of(path) == folder)
        assert terms <= terms_in(text), f"remove from PENDING: {folder}, {terms - terms_in(text)}"
