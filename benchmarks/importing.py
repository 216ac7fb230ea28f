"""Import time of the package, each time in a new process in which torch is already imported."""

import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .case import Candidate, Case, Setup
from .grid import Grid

KIND = "Import"
SECONDS = "import of transformer after torch, seconds"
PROGRAM = "import time, torch; began = time.perf_counter(); import transformer; print(time.perf_counter() - began)"


def cases(grid: Grid) -> Iterator[Case]:
    """One case, which does not depend on the grid."""
    del grid
    yield Case(KIND, {"module": "transformer"}, setup, weight=0.5)


def setup() -> Setup:
    """A whole process; the time of the import itself is among the details."""
    seconds: list[float] = []

    def run() -> None:
        command = [sys.executable, "-c", PROGRAM]
        root = Path(__file__).parent.parent
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        seconds.append(float(done.stdout))

    return Setup(Candidate(run), details=lambda: {SECONDS: statistics.median(seconds)})
