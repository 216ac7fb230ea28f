"""Import time of the package, each time in a new process in which torch is already imported.

Also without numba, with the compiled kernels turned off, and of the earlier version of `--before`.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .case import Candidate, Case, Setup
from .grid import Grid

KIND = "Import"
SECONDS = "import of transformer after torch, seconds"
WITHOUT, OFF, BEFORE = "without numba", "compiled kernels off", "before"
PROGRAM = "import time, torch; began = time.perf_counter(); import transformer; print(time.perf_counter() - began)"
NO_NUMBA = "import sys; sys.modules['numba'] = None; "
ROOT = Path(__file__).parent.parent


def cases(grid: Grid) -> Iterator[Case]:
    """One case; it depends on the earlier version alone."""
    yield Case(KIND, {"module": "transformer"}, partial(setup, grid.before), weight=7)


def name_of(way: str | None = None) -> str:
    """Name of the median of one way among the details."""
    return SECONDS if way is None else f"{SECONDS}, {way}"


def setup(before: Path | None = None) -> Setup:
    """Whole processes; the times of the imports themselves are among the details."""
    seconds: dict[str, list[float]] = {}

    def timed(way: str | None, folder: Path = ROOT, prefix: str = "", **environment: str) -> Candidate:
        found = seconds.setdefault(name_of(way), [])

        def run() -> None:
            variables = os.environ | {"PYTHONPATH": str(folder)} | environment
            command = [sys.executable, "-c", prefix + PROGRAM]
            done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=True)
            found.append(float(done.stdout))

        return Candidate(run)

    others = {
        f"ours, {WITHOUT}": timed(WITHOUT, prefix=NO_NUMBA),
        f"ours, {OFF}": timed(OFF, MODULAR_ATTENTION_COMPILED="0"),
    }
    if before is not None:
        others[f"ours {BEFORE}"] = timed(BEFORE, before)
    # The first of each fills the system's cache of files.
    return Setup(
        timed(None),
        others=others,
        details=lambda: {name: statistics.median(found[1:] or found) for name, found in seconds.items()},
    )
