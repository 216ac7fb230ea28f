"""Import directions of the packages in `transformer/`, and code that is not allowed there."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "transformer"

# From the bottom up, as in docs/architecture.md: a file imports from its own room and from those before it.
# "" is the package's own __init__.py, the front door: it shows every room, and only the commands enter by it.
ROOMS = (
    "errors",
    "deprecation",
    "extras",
    "files",
    "tensor_files",
    "tracing",
    "plain",
    "initialization",
    "signatures",
    "masks",
    "codecs",
    "kernels",
    "positions",
    "cache",
    "attention",
    "blocks",
    "generation",
    "models",
    "parallel",
    "checkpoints",
    "",
    "cli",
    "__main__",
    # Last, so that nothing imports them.
    "plots",
    "engines",
)

# What only the extras install. numpy counts too: torch runs without it, and so must the library.
EXTRAS = (
    "transformers",
    "x_transformers",
    "matplotlib",
    "tqdm",
    "pytest",
    "hypothesis",
    "sybil",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "prompt_toolkit",
    "numpy",
    "numba",
    "llvmlite",
)

IMPORT_WITHOUT_EXTRAS = f"""
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"{{name}} comes with an extra only", name=name)

sys.meta_path.insert(0, Refuse())
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


class File(NamedTuple):
    module: str
    is_package: bool
    source: str

    @property
    def room(self) -> str:
        return room_of(self.module)


def read_package(root: Path = ROOT) -> list[File]:
    files = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        files.append(File(module, is_package, path.read_text(encoding="utf-8")))
    return files


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def own_imports(file: File, modules: set[str]) -> Iterator[str]:
    """The modules of this package that a file imports, at any place in the file."""
    for node in ast.walk(ast.parse(file.source)):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = file.module if file.is_package else file.module.rpartition(".")[0]
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), here)
            named = [f"{origin}.{alias.name}" for alias in node.names]
            targets = [name if name in modules else origin for name in named]
        yield from (target for target in targets if target.split(".")[0] == PACKAGE)


def wrong_directions(files: list[File]) -> list[str]:
    modules = {file.module for file in files}
    found = []
    for file in files:
        if file.room not in ROOMS:
            found.append(f"{file.module} stands in no room")
            continue
        window_bounds = ROOMS[: ROOMS.index(file.room) + 1]
        targets = own_imports(file, modules)
        found += [f"{file.module} imports {name}" for name in targets if room_of(name) not in window_bounds]
    return found


def cycles(files: list[File]) -> list[str]:
    modules = {file.module for file in files}
    graph = {file.module: set(own_imports(file, modules)) - {file.module} for file in files}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def utils_files(files: list[File]) -> list[str]:
    return [file.module for file in files if file.module.split(".")[-1] == "utils"]


def asserts(files: list[File]) -> list[str]:
    return [
        f"{file.module}, line {node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.source))
        if isinstance(node, ast.Assert)
    ]


def hasattr_calls(files: list[File]) -> list[str]:
    return [
        f"{file.module}, line {node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr"
    ]


NEEDS_ITS_EXTRA = "engines"
"""The room whose classes are those of an optional package, so that it cannot be imported without it."""

COMPILED = f"{PACKAGE}.kernels.compiled.loops."
"""Files of what numba compiles: the room imports them late, where numba is installed."""


def import_without_extras(modules: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    # torch says so, at its own import, when numpy is not there.
    without_numpy = "ignore:Failed to initialize NumPy:UserWarning"
    command = [sys.executable, "-W", "error", "-W", without_numpy, "-c", IMPORT_WITHOUT_EXTRAS, *modules]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [wrong_directions, cycles, utils_files, asserts, hasattr_calls])
def test_the_package_keeps_the_rule(rule):
    files = read_package()
    assert files
    assert rule(files) == []


@pytest.mark.parametrize(
    ("rule", "module", "source", "complaint"),
    [
        (wrong_directions, "masks", "import transformer.cache.layer", "imports transformer.cache.layer"),
        (wrong_directions, "masks", "from transformer.cache import layer", "imports transformer.cache.layer"),
        (wrong_directions, "masks", "from .cache.layer import Layer", "imports transformer.cache.layer"),
        (wrong_directions, "masks", "def f():\n    from . import cache", "imports transformer.cache"),
        (wrong_directions, "masks", "from transformer import MultiHeadAttention", "imports transformer"),
        (wrong_directions, "helpers", "", "transformer.helpers stands in no room"),
        (wrong_directions, "masks", "from transformer.helpers import f", "imports transformer.helpers"),
        (cycles, "cache.buffer", "from transformer.cache import layer", "layer -> transformer.cache.buffer"),
        (utils_files, "cache.utils", "", "transformer.cache.utils"),
        (asserts, "masks", "def f(x):\n    assert x", "transformer.masks, line 2"),
        (hasattr_calls, "masks", "f = hasattr(f, 'x')", "transformer.masks, line 1"),
    ],
)
def test_a_breach_of_the_rule_is_found(rule, module, source, complaint):
    house = [
        File("transformer", True, "from transformer.masks import f"),
        File("transformer.cache", True, "from .layer import Layer"),
        File("transformer.cache.layer", False, "import transformer.cache.buffer\nfrom ..masks import f"),
        File("transformer.cli", True, "from transformer import f"),
        File("transformer.__main__", False, "from transformer.cli import f"),
    ]
    assert rule(house) == []
    breach = File(f"transformer.{module}", False, source)
    assert complaint in "; ".join(rule([*house, breach]))


@pytest.mark.slow
def test_every_module_imports_without_the_extras():
    files = [file for file in read_package() if file.room != NEEDS_ITS_EXTRA]
    run = import_without_extras([file.module for file in files if not file.module.startswith(COMPILED)], ROOT)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_the_room_of_engines_says_which_extra_it_needs():
    run = import_without_extras([f"{PACKAGE}.{NEEDS_ITS_EXTRA}"], ROOT)
    assert 'transformer.engines needs transformers: pip install -e ".[engines]"' in run.stderr


def test_an_import_of_an_extra_is_found(tmp_path):
    (tmp_path / "needy.py").write_text("import tqdm.auto\n")
    run = import_without_extras(["needy"], tmp_path)
    assert "tqdm comes with an extra only" in run.stderr
