"""Exceptions while a conversation is offloaded or comes back, at any operation and line: nothing is lost of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from tests.blocks.stacks import cache_snapshots, make
from tests.cache.offloaded import STACKS, fed, step
from tests.faults.inject import ERRORS, Injected
from tests.simulated_device import DEVICE, counted_waits
from transformer import KVCache
from transformer import files as replacing
from transformer.cache import elsewhere, files, lease, offload, stored

NAME = "readers"


class Action:
    """A conversation that is to go, or to come back, and what must be true of it when that has failed."""

    def __init__(self, name: str, where: object) -> None:
        self.back, self.where, self.stack = name == "comes back", where, make(STACKS[NAME])
        clean, self.first = fed(NAME)
        self.before = cache_snapshots(clean)
        self.first.remove(clean)
        self.expected = self.followed(self.first.fork())

    def begin(self) -> None:
        self.cache = self.first.fork()
        if self.back:
            self.cache.offload(self.where)

    def run(self) -> None:
        if self.back:
            self.cache.fork()
        else:
            self.cache.offload(self.where)

    def followed(self, cache: KVCache) -> object:
        """A snapshot, and another one after the next call."""
        with cache.installed(self.stack):
            before = cache_snapshots(self.stack)
            step(self.stack, NAME)
            return before, cache_snapshots(self.stack)

    def check(self) -> None:
        assert (self.cache.length, self.cache.batch, self.cache.lengths.tolist()) == (7, 2, [7, 5])
        assert self.followed(self.cache) == self.expected


@contextmanager
def place(name: str, folder: Path) -> Iterator[object]:
    """Where it is offloaded to."""
    if name == "file":
        yield folder / "chat"
    else:
        with counted_waits():
            yield DEVICE


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the disk, hundreds of times."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["goes", "comes back"])
@pytest.mark.parametrize("where", ["file", "device"])
def test_an_exception_at_any_operation(where: str, name: str, tmp_path: Path) -> None:
    with place(where, tmp_path) as target:
        action = Action(name, target)
        action.begin()
        with Injected() as counting:
            action.run()
        assert counting.count >= 30
        for at in range(counting.count):
            action.begin()
            with pytest.raises(tuple(ERRORS), match="injected"), Injected(at):
                action.run()
            action.check()
    sys.stdout.write(f"{where}, {name}: exceptions at {counting.count} operations, 0 changes\n")


Line = tuple[str, int]


class Traced:
    """The lines of Python that move contents, in order; KeyboardInterrupt before the one at `index`."""

    watched = tuple(module.__file__ for module in (elsewhere, files, lease, offload, replacing, stored))

    def __init__(self, index: int | None = None) -> None:
        self.index, self.lines = index, list[Line]()

    def run(self, function: Callable[[], None]) -> None:
        sys.settrace(self.trace)
        try:
            function()
        finally:
            sys.settrace(None)

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self.watched:
            return None
        if event == "line":
            if len(self.lines) == self.index:
                sys.settrace(None)
                raise KeyboardInterrupt
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
        return self.trace


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*FileIO:pytest.PytestUnraisableExceptionWarning"
)  # opened, and not yet in a `with`
@pytest.mark.parametrize("name", ["goes", "comes back"])
@pytest.mark.parametrize("where", ["file", "device"])
def test_an_interrupt_at_any_line(where: str, name: str, tmp_path: Path) -> None:
    """Before the first and the last time that each of them runs."""
    with place(where, tmp_path) as target:
        action = Action(name, target)
        action.begin()
        traced = Traced()
        traced.run(action.run)
        first = {line: index for index, line in reversed([*enumerate(traced.lines)])}
        last = {line: index for index, line in enumerate(traced.lines)}
        for index in sorted({*first.values(), *last.values()}):
            action.begin()
            with pytest.raises(KeyboardInterrupt):
                Traced(index).run(action.run)
            action.check()
    assert len(first) > 30
    if where == "file":
        assert [path.name for path in tmp_path.iterdir()] == ["chat"]
    sys.stdout.write(f"{where}, {name}: interrupts at {len(first)} lines, 0 changes\n")


def test_the_tests_above_see_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation that forgets before it has written."""
    action = Action("goes", tmp_path / "chat")
    action.begin()

    def forgetful(*_: object) -> object:
        action.cache.truncate(6)
        raise KeyboardInterrupt

    monkeypatch.setattr(stored, "replace_file", forgetful)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        action.run()
    with pytest.raises(AssertionError):
        action.check()
