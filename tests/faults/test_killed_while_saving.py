"""Processes that are killed while they save or offload: the file is the old one or the new one, complete."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from tests.blocks.stacks import MIXED, cache_snapshots, make
from tests.setups import tokens
from transformer import KVCache
from transformer import files as replacing
from transformer.cache import files, offload, stored

resource = pytest.importorskip("resource", reason="a child is a fork, which costs no second import of torch: posix")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")]

WAYS = [KVCache.save, KVCache.offload]


class Saved:
    """A file with one conversation, over which children save another, in one of two ways."""

    def __init__(self, folder: Path, way: Callable[[KVCache, Path], object]) -> None:
        self.way, self.path, self.new = way, folder / "chat.safetensors", said(2, 40)
        self.contents = []
        for cache in (self.new, said(1, 9)):
            cache.save(self.path)
            self.contents.append((self.path.read_bytes(), content(cache)))
        self.found: list[str] = []
        self.beside = 0

    def killed(self, by: signal.Signals, before: Callable[[], None]) -> bool:
        """True if a child that saves after `before` was killed; its file is then the one conversation or the other, bit
        for bit."""
        (_, new), (old_bytes, old) = self.contents
        self.path.write_bytes(old_bytes)
        code = exit_code(before, lambda: self.way(self.new, self.path))
        assert code in (0, -by)
        loaded = content(KVCache.load(self.path))
        assert loaded in (old, new)
        self.found.append("new" if loaded == new else "old")
        # Unfinished files may lie beside it, under names of their own.
        others = [entry for entry in self.path.parent.iterdir() if entry != self.path]
        self.beside += len(others)
        for other in others:
            other.unlink()
        return code != 0

    def report(self, name: str) -> None:
        old, new = (self.found.count(kind) for kind in ("old", "new"))
        sys.stdout.write(f"{name}: {old} old files, {new} new ones, 0 torn, {self.beside} unfinished ones beside\n")


def said(seed: int, length: int) -> KVCache:
    stack = make(MIXED)
    with torch.no_grad():
        stack(tokens(2, length, 16, seed=seed))
    return KVCache.from_model(stack).remove(stack)


def content(cache: KVCache) -> list[object]:
    stack = make(MIXED)
    cache.install(stack)
    found = cache_snapshots(stack)
    cache.remove(stack)
    return found


def exit_code(*calls: Callable[[], None]) -> int:
    """Of a child that does only this; below zero: the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            for call in calls:
                call()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class KilledAtLine:
    """Traces Python; SIGKILL before line number `left` (from 0) of those that write a file."""

    watched = (files.__file__, replacing.__file__, offload.__file__, stored.__file__)

    def __init__(self, left: int) -> None:
        self.left = left

    def begin(self) -> None:
        sys.settrace(self.trace)

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self.watched:
            return None
        if event == "line":
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
        return self.trace


@pytest.mark.parametrize("way", WAYS)
def test_killed_before_any_line(way: Callable[[KVCache, Path], object], tmp_path: Path) -> None:
    """SIGKILL before each line of Python that a save runs: up to some line the old file is there, after it the new
    one."""
    saved = Saved(tmp_path, way)
    kills = next(line for line in count() if not saved.killed(signal.SIGKILL, KilledAtLine(line).begin))
    saved.report(f"{kills} kills")
    assert kills >= 60
    assert saved.found == sorted(saved.found, reverse=True)
    assert min(saved.found.count(kind) for kind in ("old", "new")) > 1
    assert 1 < saved.beside < kills, "some kills came while a file was being written"


@pytest.mark.parametrize("way", WAYS)
def test_killed_in_the_middle_of_a_write(way: Callable[[KVCache, Path], object], tmp_path: Path) -> None:
    """By the kernel, after so many bytes of the file as were written: the old one is untouched."""
    saved = Saved(tmp_path, way)
    size = len(saved.contents[0][0])

    def written_up_to(most: int) -> Callable[[], None]:
        def limited() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        return limited

    for most in (0, 1, 8, 100, *range(1000, size, size // 20), size - 1):
        assert saved.killed(signal.SIGXFSZ, written_up_to(most))
        assert saved.found[-1] == "old"
    assert not saved.killed(signal.SIGXFSZ, written_up_to(size))
    saved.report(f"{len(saved.found)} writes cut")
    assert saved.beside == len(saved.found) - 1
