"""Files: read with a size limit and replaced atomically, also after a failure at any line."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from transformer import files
from transformer.errors import ArgumentError, FileFormatError, ForeignFileError
from transformer.files import read_file, replace_file

posix = pytest.mark.skipif(os.name != "posix", reason="links, modes, pipes and limits of posix")

OLD, NEW = b"old" * 1000, b"new" * 2000


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A socket's path may have about a hundred characters."""
    path = Path("/tmp") / f"socket-{os.getpid()}"
    yield path
    path.unlink(missing_ok=True)


def make(kind: str, path: Path) -> None:
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "endless":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)


@posix
@pytest.mark.parametrize("kind", ["folder", "pipe", "endless", "loop"])
def test_only_regular_files_are_read_and_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    make(kind, path)
    with pytest.raises(FileFormatError, match=rf"^{path}: expected a regular file, got"):
        read_file(path, 100)
    before = os.lstat(path)
    with pytest.raises((ForeignFileError, OSError), match=str(path)):
        replace_file(path, NEW)
    assert os.lstat(path).st_ino == before.st_ino
    assert list(tmp_path.iterdir()) == [path]


@posix
def test_a_socket_is_not_read(short_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(short_path))
        with pytest.raises(FileFormatError, match="got a socket"):
            read_file(short_path, 100)


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    assert read_file(path, len(OLD)) == OLD
    with pytest.raises(FileFormatError, match=r"expected at most 2,999 bytes, got 3,000"):
        read_file(path, len(OLD) - 1)


def test_reading_takes_the_memory_of_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    tracemalloc.start()
    read_file(tmp_path / "file", 1 << 30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("call", [lambda path: read_file(path, 9), lambda path: replace_file(path, NEW)])
def test_a_name_that_no_file_can_have(call: Callable[[str], object]) -> None:
    with pytest.raises(ArgumentError, match="expected the name of a file"):
        call("a\0b")


@posix
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640, 0o444])
def test_a_replaced_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    path.chmod(mode)
    replace_file(path, NEW)
    assert path.read_bytes() == NEW
    assert stat.S_IMODE(path.stat().st_mode) == mode


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_gets_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        replace_file(tmp_path / "file", NEW)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


@posix
def test_others_cannot_read_a_private_file_while_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, modes = tmp_path / "file", []
    path.write_bytes(OLD)
    path.chmod(0o600)
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (modes.append(os.fstat(handle).st_mode & 0o777), sync(handle)))
    replace_file(path, NEW)
    assert modes[0] == 0o600


@posix
@pytest.mark.parametrize("there", [True, False])
def test_links_are_followed_and_stay(tmp_path: Path, there: bool) -> None:
    (tmp_path / "far").mkdir()
    target, link, second = tmp_path / "far" / "target", tmp_path / "link", tmp_path / "second"
    if there:
        target.write_bytes(OLD)
    link.symlink_to("far/target")
    second.symlink_to(link)
    replace_file(second, NEW)
    assert second.is_symlink()
    assert link.is_symlink()
    assert target.read_bytes() == NEW
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("name", ["a" * 255, ".x", " ", "new\nline", "ü ☃.bin", "\udcff"])
def test_any_name_of_the_system_works(tmp_path: Path, name: str) -> None:
    try:
        (tmp_path / name).write_bytes(OLD)
    except (OSError, ValueError):
        pytest.skip("not a name of this system")
    replace_file(tmp_path / name, NEW)
    assert (tmp_path / name).read_bytes() == NEW
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("name", "said"), [("no/file", "make its folder first"), ("a" * 300, "choose a shorter name")])
def test_a_place_that_there_is_not(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(OSError, match=f"could not be written: .*; {said}.*{name}"):
        replace_file(tmp_path / name, NEW)
    assert list(tmp_path.iterdir()) == []


@posix
def test_a_link_to_itself_is_not_written_to(tmp_path: Path) -> None:
    make("loop", tmp_path / "file")
    with pytest.raises(OSError, match=r"could not be written: .*; remove the link"):
        replace_file(tmp_path / "file", NEW)


@posix
def test_a_path_of_nearly_the_longest_length(tmp_path: Path) -> None:
    """The name of the temporary file is not much longer than a short name."""
    path = tmp_path
    while len(str(path)) < 3800:
        path = path / ("a" * 200)
    path = path / ("b" * (4077 - len(str(path)) - 3)) / "c"
    path.parent.mkdir(parents=True)
    replace_file(path, NEW)
    assert len(str(path)) == 4077
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("path", [None, 1, b"file", True, ["file"]])
@pytest.mark.parametrize("call", [lambda path: read_file(path, 9), lambda path: replace_file(path, NEW)])
def test_what_is_no_path(call: Callable[[object], object], path: object) -> None:
    """A number would be a file that is already open."""
    with pytest.raises(ArgumentError, match=r"^path: expected the name of a file"):
        call(path)


# --- faults ---------------------------------------------------------------------------------------------------------


class AtLine:
    """Does something before line number `left` (from 0) of those that replace a file."""

    def __init__(self, left: int, act: Callable[[], None]) -> None:
        self.left, self.act = left, act

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == "line":
            self.left -= 1
            if self.left == -1:
                self.act()
        return self


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def replace_traced(path: Path, fault: AtLine, expected: type[BaseException]) -> None:
    """Replaces the file in a thread that `fault` traces, and lets the expected error pass.

    A thread of its own: an error that a trace function raises inside an `except` block remains the exception that the
    thread handles (CPython 3.11), and then appears in the errors of later tests.
    """
    others: list[BaseException] = []

    def work() -> None:
        sys.settrace(fault)
        try:
            replace_file(path, NEW)
        except expected:
            pass
        except BaseException as error:
            others.append(error)
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not others, others


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("there", [True, False])
def test_a_fault_at_any_line_leaves_one_whole_file_and_nothing_beside(
    tmp_path: Path, error: BaseException, there: bool
) -> None:
    path, found = tmp_path / "file", []
    for line in count():
        path.unlink(missing_ok=True)
        if there:
            path.write_bytes(OLD)
        fault = AtLine(line, raising(error))
        replace_traced(path, fault, type(error))
        found.append(path.read_bytes() if path.exists() else b"")
        assert list(tmp_path.iterdir()) == ([path] if found[-1] else [])
        if fault.left >= 0:
            break
    kept = OLD if there else b""
    assert set(found) == {kept, NEW}
    assert found == sorted(found, key=lambda content: content == NEW), "the old one up to a line, then the new one"
    assert len(found) > 20


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod", "open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_an_error_of_the_system_names_the_file_and_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    monkeypatch.setattr(os, call, lambda *_, **__: raising(OSError(number, os.strerror(number)))())
    with pytest.raises(OSError, match=rf"could not be written: .*; (make room|choose).*{path}") as raised:
        replace_file(path, NEW)
    monkeypatch.undo()
    assert raised.value.errno == number
    assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]


@posix
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_disk_that_is_full_within_a_write(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "file"
    path.write_bytes(OLD)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            replace_file(path, NEW)
        except OSError as error:
            os._exit(3 if "raise the limit" in str(error) else 4)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]
