"""Counts of calls: of linear layers, without hooks, which would prevent keeping a source; of functions, by file."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TypeVar

import pytest
from torch import Tensor, nn

import transformer

PACKAGE = Path(transformer.__file__).parent
MACHINE_CODE = PACKAGE / "kernels" / "compiled" / "loops"

NameT = TypeVar("NameT")


def calls_of(linears: Mapping[nn.Module, NameT], monkeypatch: pytest.MonkeyPatch) -> list[NameT]:
    """The names of these linears, one for each time that they run from now on, until the test ends."""
    ran: list[NameT] = []
    forward = nn.Linear.forward

    def counted(linear: nn.Linear, x: Tensor) -> Tensor:
        if linear in linears:
            ran.append(linears[linear])
        return forward(linear, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    return ran


def calls_by_file(work: Callable[[], object]) -> Counter[str]:
    """How many calls of functions of each file of the package, by its path there, some work makes."""
    counted: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        # numba reports machine code as a call of the function that it was compiled from.
        if event == "call" and PACKAGE in path.parents and MACHINE_CODE not in path.parents:
            counted[path.relative_to(PACKAGE).as_posix()] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return counted
