"""Files on disk: reading with a size limit, and atomic replacement."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from .errors import ArgumentError, FileFormatError, ForeignFileError, shown

NOT_A_FILE = {
    errno.ELOOP: "a link that leads to itself",
    errno.ENXIO: "a socket or device",
    errno.ENAMETOOLONG: "a name longer than the system allows",
}
"""Kind of object at a path, by the `errno` of a failed open."""

REMEDIES = {
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
"""Remedy for a failed write, by its `errno`."""


@contextmanager
def open_file(path: str | PathLike[str], max_bytes: int) -> Iterator[BinaryIO]:
    """A regular file of at most `max_bytes` bytes, opened for reading.

    Raises ArgumentError if `path` is not a path, FileNotFoundError or PermissionError if the file cannot be opened,
    and FileFormatError, with the path, if it is not a regular file (reading a pipe or a device may never end) or has
    more bytes.
    """
    _check_path(path)
    try:
        # Without O_NONBLOCK, opening a pipe waits for its other end.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if error.errno in NOT_A_FILE:
            raise FileFormatError(f"{path}: expected a regular file, got {NOT_A_FILE[error.errno]}") from error
        raise
    except ValueError as error:
        raise ArgumentError(
            f"{str(path)!r}: expected the name of a file, got a name that the system refuses"
        ) from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise FileFormatError(f"{path}: expected a regular file, got {_file_type(status)}")
        if status.st_size > max_bytes:
            raise FileFormatError(f"{path}: expected at most {max_bytes:,} bytes, got {status.st_size:,}")
        with os.fdopen(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def read_file(path: str | PathLike[str], max_bytes: int) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes. Raises as `open_file` does."""
    with open_file(path, max_bytes) as file:
        # `read(n)` allocates n bytes at once, so n is the size of the file where that is smaller.
        return file.read(min(max_bytes, os.fstat(file.fileno()).st_size))


def replace_file(path: str | PathLike[str], content: bytes) -> None:
    """Replaces a file atomically: writes `content` to a temporary file in its folder, syncs it, and renames it.

    A link stays, and its target is replaced. A replaced file keeps its mode; a new file gets the mode of the umask.
    Raises ArgumentError if `path` is not a path, ForeignFileError for a folder or anything else that is not a regular
    file, and an OSError with the file and a remedy if the file cannot be written. The temporary file is then removed.
    """
    _check_path(path)
    try:
        mode = _existing_mode(path)
        target = os.path.realpath(path)
        # A short name: a long one could exceed the system's limit where the target's own name does not.
        temporary = os.path.join(os.path.dirname(target), f".{secrets.token_hex(4)}.tmp")
        _write_and_rename(target, temporary, content, mode)
    except ForeignFileError:
        raise
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "choose another place")
        raise OSError(error.errno, f"could not be written: {error.strerror}; {remedy}", os.fspath(path)) from error
    except ValueError as error:
        raise ArgumentError(
            f"{str(path)!r}: expected the name of a file, got a name that the system refuses"
        ) from error


def _write_and_rename(target: str, temporary: str, content: bytes, mode: int | None) -> None:
    try:
        with open(temporary, "xb", opener=None if mode is None else _open_private) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(temporary, mode)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync(Path(target).parent)


def sync(path: Path) -> None:
    """Syncs a file, or the names in a folder, to disk, if the system allows it to be opened."""
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        # A folder can be writable and not readable.
        if is_folder:
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_path(path: object) -> bool:
    """True for a path as text. Bytes are refused, and an int would be the descriptor of an open file."""
    return isinstance(path, str | PathLike) and isinstance(os.fspath(path), str)


def _check_path(path: object) -> None:
    """Raises ArgumentError unless this is a path as text."""
    if not is_path(path):
        raise ArgumentError(f"path: expected the name of a file, as a str or a pathlib.Path, got {shown(path)}")


def _existing_mode(path: str | PathLike[str]) -> int | None:
    """The mode of the file at `path`; None if there is no file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise ForeignFileError(f"{path}: expected the name of a file, got {_file_type(status)}; choose another name")
    return stat.S_IMODE(status.st_mode)


def _file_type(status: os.stat_result) -> str:
    return "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"


def _open_private(path: str, flags: int) -> int:
    """Opens a file for its owner alone, until it gets the mode of the file that it replaces."""
    return os.open(path, flags, 0o600)
