"""Files on disk: read up to a size, replaced whole."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from .errors import ArgumentError, FileFormatError, ForeignFileError

NOT_A_FILE = {
    errno.ELOOP: "a link that leads to itself",
    errno.ENXIO: "a socket or device",
    errno.ENAMETOOLONG: "a name beyond the system's limit",
}
"""What a path names, by the error of the system that tells it."""

ADVICE = {
    errno.ENOSPC: "make room there, or choose another place",
    errno.EDQUOT: "make room there, or choose another place",
    errno.EFBIG: "raise the limit on the size of files, or choose another place",
    errno.ENOENT: "make its folder first",
    errno.ENOTDIR: "make its folder first",
    errno.EACCES: "choose a folder that you may write into",
    errno.EPERM: "choose a folder that you may write into",
    errno.EROFS: "choose a folder that can be written into",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the link, which leads to no file, or choose another name",
}
"""What helps where a file cannot be written, by the error of the system."""


@contextmanager
def open_file(path: str | PathLike[str], most: int) -> Iterator[BinaryIO]:
    """A regular file of at most `most` bytes, opened to be read.

    Raises ArgumentError for what is no path, FileNotFoundError or PermissionError where it cannot be opened, and
    FileFormatError, naming the path, for anything that is not a regular file (a pipe would wait for ever, a device
    never end) and for more bytes.
    """
    _check_path(path)
    try:
        # Opening a pipe waits for its other end, unless told not to.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if error.errno in NOT_A_FILE:
            raise FileFormatError(f"{path}: expected a regular file, got {NOT_A_FILE[error.errno]}") from error
        raise
    except ValueError as error:
        raise ArgumentError(f"{str(path)!r}: expected the name of a file, got one that the system refuses") from error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise FileFormatError(f"{path}: expected a regular file, got {_kind(found)}")
        if found.st_size > most:
            raise FileFormatError(f"{path}: expected at most {most:,} bytes, got {found.st_size:,}")
        with os.fdopen(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def read_file(path: str | PathLike[str], most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises as `open_file` does."""
    with open_file(path, most) as file:
        # Python makes room at once for as many bytes as it is asked for.
        return file.read(min(most, os.fstat(file.fileno()).st_size))


def replace_file(path: str | PathLike[str], content: bytes) -> None:
    """Puts `content` in place of a file, whole or not at all: beside it first, synced, and then renamed onto it.

    A link stays, and what it leads to is replaced. A file that is replaced keeps its mode; a new one gets that of the
    umask. Raises ArgumentError for what is no path, ForeignFileError for a folder or anything else that is not a
    regular file, and an OSError that names the file and says what helps where it cannot be written; nothing is then
    left beside it.
    """
    _check_path(path)
    try:
        mode = _mode(path)
        target = os.path.realpath(path)
        # A short name, so that there is room for it wherever the target's has room.
        _replace(target, os.path.join(os.path.dirname(target), f".{secrets.token_hex(4)}.tmp"), content, mode)
    except ForeignFileError:
        raise
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, "choose another place")
        raise OSError(error.errno, f"could not be written: {error.strerror}; {advice}", os.fspath(path)) from error
    except ValueError as error:
        raise ArgumentError(f"{str(path)!r}: expected the name of a file, got one that the system refuses") from error


def _replace(target: str, beside: str, content: bytes, mode: int | None) -> None:
    try:
        with open(beside, "xb", opener=None if mode is None else _private) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(beside, mode)
        os.replace(beside, target)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    sync(Path(target).parent)


def sync(path: Path) -> None:
    """Makes last what was written to a file, or renamed in a folder, where the system lets it be opened."""
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        # A folder may be written into, and yet not be read.
        if is_folder:
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_path(path: object) -> bool:
    """Whether this is a path of text: bytes are none here, and a number would be an open file's."""
    return isinstance(path, str | PathLike) and isinstance(os.fspath(path), str)


def _check_path(path: object) -> None:
    """Raises ArgumentError unless this is a path as text."""
    if not is_path(path):
        raise ArgumentError(f"path: expected the name of a file, as a str or a pathlib.Path, got {path!r:.200}")


def _mode(path: str | PathLike[str]) -> int | None:
    """The mode of the file that is to be replaced; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise ForeignFileError(f"{path}: expected the name of a file, got {_kind(found)}; choose another name")
    return stat.S_IMODE(found.st_mode)


def _kind(found: os.stat_result) -> str:
    return "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"


def _private(path: str, flags: int) -> int:
    """Opens a file that others cannot read before it has the mode of the one that it replaces."""
    return os.open(path, flags, 0o600)
