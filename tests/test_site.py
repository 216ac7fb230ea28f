"""Site of the documents: every page is in the navigation, names in the API reference exist, paths in texts exist."""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from transformer import errors

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "KV_CACHE_EXAMPLES.md", *PAGES]

# Packages of which the API reference has every class and function that they export.
DOCUMENTED = (
    "transformer",
    "transformer.attention",
    "transformer.positions",
    "transformer.blocks",
    "transformer.models",
    "transformer.generation",
    "transformer.checkpoints",
    "transformer.engines",
)

REFERENCE = re.compile(r"^::: (\S+)$", re.MULTILINE)
MEMBERS = re.compile(r"^::: (\S+)\n    options:\n(?:      .*\n)*?      members: \[(.*)\]$", re.MULTILINE)
LOADED = re.compile(r"!\[[^]]*\]\(([^)]*)\)|src=\"([^\"]*)\"")
PATH = re.compile(r"`((?:benchmarks|docs|examples|stages|tests|transformer)/[\w./-]*)`")


def navigated(entries: list) -> Iterator[str]:
    for entry in entries:
        for target in entry.values():
            if isinstance(target, str):
                yield target
            else:
                yield from navigated(target)


def referenced() -> list[str]:
    return [name for page in PAGES for name in REFERENCE.findall(page.read_text(encoding="utf-8"))]


def resolve(name: str) -> object:
    """The object of a dotted name, as mkdocstrings reads it: of a module and a function of one name the module."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


def test_every_page_is_in_the_navigation_once():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(navigated(site["nav"])) == [page.relative_to(DOCS).as_posix() for page in PAGES]


def test_nothing_is_loaded_from_another_host():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert site["theme"]["font"] is False
    # Material loads the script of diagrams from another host, so drawings are SVG files.
    assert "mermaid" not in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    loaded = [site.get("extra_javascript", []), site["extra_css"]]
    loaded += [map("".join, LOADED.findall(page.read_text(encoding="utf-8"))) for page in TEXTS]
    assert [each for group in loaded for each in group if "//" in each] == []


def test_no_page_is_a_title_alone():
    assert [page.name for page in PAGES if len(page.read_text(encoding="utf-8").splitlines()) < 3] == [
        "kv_cache_examples.md"  # takes in KV_CACHE_EXAMPLES.md
    ]


@pytest.mark.parametrize("name", referenced())
def test_a_name_in_the_reference_exists_and_has_a_docstring(name):
    found = resolve(name)
    assert not inspect.ismodule(found)
    if not isinstance(found, dict) and not hasattr(found, "__origin__"):
        assert inspect.getdoc(found)


@pytest.mark.parametrize(
    ("name", "members"),
    [found for page in PAGES for found in MEMBERS.findall(page.read_text(encoding="utf-8"))],
)
def test_members_that_the_reference_asks_for_exist(name, members):
    # mkdocstrings leaves out what it does not find.
    for member in members.split(", "):
        assert inspect.getdoc(getattr(resolve(name), member)), member


def public() -> Iterator[tuple[str, object]]:
    for package in DOCUMENTED:
        module = importlib.import_module(package)
        yield from ((f"{package}.{name}", getattr(module, name)) for name in module.__all__)
    yield from ((f"transformer.errors.{name}", found) for name, found in vars(errors).items() if is_error(found))


def is_error(found: object) -> bool:
    return inspect.isclass(found) and issubclass(found, errors.AttentionError)


def test_the_reference_has_every_public_class_and_function():
    named = [resolve(name) for name in referenced()]
    missing = [
        name
        for name, found in public()
        if inspect.isroutine(found) or inspect.isclass(found)
        # Signatures show what the TypedDicts of options hold.
        if not any(found is each for each in named) and not name.endswith("Keywords")
    ]
    assert missing == []


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_paths_in_texts_exist(text):
    named = {name for name in PATH.findall(text.read_text(encoding="utf-8")) if not name.endswith("...")}
    assert sorted(name for name in named if not (ROOT / name).exists()) == []
