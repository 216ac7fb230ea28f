"""Decode steps of a model that two processes share, beside one process: how much the host takes for sharing.

The model is so small that the host takes nearly all the time. Every process has one thread.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .case import Candidate, Case, Setup
from .grid import Grid
from .our_models import decoder_options
from .own_process import OwnProcess
from .shapes import EIGHT_LAYERS, Model

KIND = "Decode step of a model on two ranks"
ALONE = "one process"
HELD = 64


def cases(grid: Grid) -> Iterator[Case]:
    """One row and one new token, over gloo."""
    if grid.on_cpu:
        yield Case(KIND, {"model": EIGHT_LAYERS.name, "ranks": 2}, partial(setup, EIGHT_LAYERS), 3, threads=1)


def setup(shape: Model) -> Setup:
    """The logits of one more token, in processes of their own: the ways between them count for both alike."""
    arguments, options = decoder_options(shape)
    folder = tempfile.TemporaryDirectory()
    meeting = str(Path(folder.name) / "meeting")
    alone = [OwnProcess("ranks_process.py", "0", "1", meeting)]
    shared = [OwnProcess("ranks_process.py", str(rank), "2", meeting) for rank in range(2)]
    for processes in (alone, shared):
        ask(processes, build=[arguments, options], held=HELD)

    def close() -> None:
        for process in (*alone, *shared):
            process.close()
        folder.cleanup()

    return Setup(candidate(shared), others={ALONE: candidate(alone)}, close=close)


def candidate(processes: list[OwnProcess]) -> Candidate:
    """A step of the model that these processes have."""
    return Candidate(lambda: ask(processes), lambda: ask(processes, forget=HELD))


def ask(processes: list[OwnProcess], **request: object) -> None:
    """Has all of them do the same at the same time."""
    for process in processes:
        process.tell(**request)
    for process in processes:
        process.answer()
