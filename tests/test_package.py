"""Package metadata: one version, one command, pinned versions, and a workflow that runs the checks and nothing else."""

import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from transformer import __version__, cli
from transformer.cli.commands import program_name

ROOT = Path(__file__).resolve().parent.parent


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def section(heading: str) -> str:
    """A table of pyproject.toml. By hand, since Python 3.10 has no tomllib."""
    return read("pyproject.toml").partition(f"\n[{heading}]\n")[2].partition("\n[")[0]


def requirements() -> set[str]:
    """The distributions that pyproject.toml names, apart from the library itself."""
    lists = read("pyproject.toml").partition("\ndependencies = ")[2].partition("\n[tool.")[0]
    lists = re.sub(r"(?m)#.*$", "", lists)
    names = {normal(name) for name in re.findall(r'"([A-Za-z][\w.-]*)(?:\[[\w,]+\])?(?:[<>=,.\d]*)"', lists)}
    return names - {"modular-attention"}


def pins() -> dict[str, str]:
    lines = [line.partition("==") for line in read(".ci/constraints.txt").splitlines() if not line.startswith("#")]
    return {normal(name): version for name, _, version in lines}


def test_the_version_stands_in_one_place_and_is_the_one_that_is_released() -> None:
    assert 'dynamic = ["version"]' in section("project")
    assert section("tool.hatch.version").strip() == 'path = "transformer/__init__.py"'
    latest = re.search(r"(?m)^## \[(\d\S*)\] - (\S+)$", read("CHANGELOG.md"))
    assert latest
    assert latest[1] == __version__
    assert f"\nversion: {__version__}\ndate-released: {latest[2]}\n" in read("CITATION.cff")


def deprecated_names() -> set[str]:
    """The old names that the source gives to `warn_old` and, package by package, to `old_names`."""
    found = set()
    for path in (ROOT / "transformer").rglob("*.py"):
        source = path.read_text("utf-8")
        found |= set(re.findall(r'\bwarn_old\(\s*"([\w.]+)"', source))
        package = ".".join(path.parent.relative_to(ROOT).parts)
        for names in re.findall(r"\bold_names\(\s*__name__,\s*\{(.*?)\}", source, re.DOTALL):
            found |= {f"{package}.{name}" for name in re.findall(r'"(\w+)": \(', names)}
    return found


def test_the_changelog_lists_the_deprecated_names() -> None:
    table = read("CHANGELOG.md").partition("### Deprecated\n")[2].partition("\n### ")[0]
    listed = re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE)
    assert listed
    assert sorted(listed) == sorted(deprecated_names())


def test_the_script_runs_the_commands() -> None:
    assert section("project.scripts").strip() == 'modular-attention = "transformer.cli:main"'
    assert cli.main is sys.modules["transformer.cli.commands"].main


@pytest.mark.parametrize(
    ("started", "shown"),
    [
        ("/usr/bin/modular-attention", "modular-attention"),
        ("modular-attention.exe", "modular-attention"),
        ("/somewhere/transformer/__main__.py", "python -m transformer"),
        ("-c", "python -m transformer"),
    ],
)
def test_help_names_the_command_that_was_typed(monkeypatch: pytest.MonkeyPatch, started: str, shown: str) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert program_name() == shown
    with redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    assert output.getvalue().startswith(f"usage: {shown} [-h] [--version] COMMAND ...")


def test_the_command_prints_the_version() -> None:
    with redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert (ended.value.code, output.getvalue()) == (0, f"{__version__}\n")


def test_everything_that_is_asked_for_is_pinned() -> None:
    # pre-commit is for a contributor's own checkout; no stage of .ci/run installs it.
    wanted = requirements() - {"pre-commit"}
    assert {"torch", "einops", "jinja2", "pytest", "ruff", "huggingface-hub"} <= wanted
    assert wanted - pins().keys() == set()
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in pins().values())


def test_what_private_parts_are_used_of_has_an_upper_bound() -> None:
    text = read("pyproject.toml")
    assert re.search(r'"torch>=[\d.]+,<[\d.]+"', text)
    assert re.search(r'"jinja2>=[\d.]+,<[\d.]+"', text)


def test_the_workflow_runs_the_checks_and_names_no_home() -> None:
    workflow = read(".github/workflows/check.yml")
    assert re.findall(r"run: (.+)", workflow) == [".ci/run"]
    for name in (".github/workflows/check.yml", "CITATION.cff", "pyproject.toml"):
        assert "://" not in read(name)


def test_the_source_distribution_has_every_file_and_folder_that_the_tests_read() -> None:
    included = set(re.findall(r'"/([\w.]+)"', section("tool.hatch.build.targets.sdist")))
    for name in ("transformer", "tests", "stages", "docs", ".ci", ".github", "CITATION.cff", "CONTRIBUTING.md"):
        assert name in included
    assert [name for name in included if not (ROOT / name).exists()] == []
