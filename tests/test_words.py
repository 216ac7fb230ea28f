"""Words of the package: a docstring at the head of every module, and no term that the field does not use."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "transformer").rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]

OPENINGS = re.compile(r"(what|how|whatever|all|where|when|whether|which|who|whoever|that|reads|writes|the one)\b", re.I)
"""Beginnings of a module docstring that do not name the thing in the module."""

# Each term with the one to use instead. `ticket` is found in `_ticket` too, but not in `tickets`.
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
    "cache": {"helds", "gained"},
}
"""Terms that files of these packages still contain. A term may be removed here, never added."""

PENDING_DOCSTRINGS: set[str] = set()
"""Modules whose docstring does not begin with a noun yet. A module may be removed here, never added."""


def package_of(path: Path) -> str:
    """The package of `transformer` that a file is in; empty for a file of `transformer` itself."""
    return path.parts[len(ROOT.parts) + 1] if len(path.parts) > len(ROOT.parts) + 2 else ""


def terms_in(text: str) -> set[str]:
    text = " ".join(text.lower().split())
    return {term for term in TERMS if re.search(rf"(?<![a-z]){re.escape(term)}(?![a-z])", text)}


@pytest.mark.parametrize("name", sorted({*IDS} - PENDING_DOCSTRINGS))
def test_a_module_docstring_begins_with_a_noun(name: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8")))
    assert docstring, "a module without a docstring"
    assert not OPENINGS.match(docstring), f"begin with the thing in this module, not with {docstring.split()[0]!r}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_module_uses_the_terms_of_the_field(path: Path) -> None:
    found = terms_in(path.read_text(encoding="utf-8")) - PENDING.get(package_of(path), set())
    assert not found, {term: f"say {TERMS[term]}" for term in found}


def test_pending_terms_are_still_there() -> None:
    """The list shrinks: a package that no longer contains any of its terms has no entry."""
    for package, terms in PENDING.items():
        text = " ".join(path.read_text(encoding="utf-8") for path in FILES if package_of(path) == package)
        assert terms & terms_in(text), f"remove {package} from PENDING"
