"""Files on disk: read up to a size, replaced whole."""

import os
import stat
import tempfile
from pathlib import Path

from .errors import FileFormatError


def read_file(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises OSError where it cannot be opened, and FileFormatError, naming the path, for anything that is not a regular
    file (a pipe would wait for ever, a device never end) and for more bytes.
    """
    # Opening a pipe waits for its other end, unless told not to.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise FileFormatError(f"{path}: expected a regular file, got another kind")
        if found.st_size > most:
            raise FileFormatError(f"{path}: expected at most {most} bytes, got {found.st_size}")
        return file.read(most)


def replace_file(target: Path, content: bytes) -> None:
    """Puts `content` in place of a file, whole or not at all: beside it first, synced, and then renamed onto it."""
    handle, beside = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    sync(target.parent)


def sync(path: Path) -> None:
    """Makes last what was written to a file, or renamed in a folder, where the system lets it be opened."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
