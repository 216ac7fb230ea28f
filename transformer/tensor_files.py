"""Safetensors files: their headers, checked before anything else of a file is read.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of the header, the header as a JSON
object, and the bytes of the tensors.
"""

import json
import os
from os import PathLike
from typing import Any, BinaryIO

from .errors import FileFormatError

LARGEST_HEADER = 1 << 24
"""Bytes, which take up to twenty times as many once they are read. Some 200,000 tensors, or two million tokens that
were said, have so many."""


def read_header(file: BinaryIO, path: str | PathLike[str]) -> dict[str, Any]:
    """The header of a safetensors file that was opened at its beginning.

    Raises FileFormatError, naming the path, unless it is an object without a name that stands there twice, which lies
    within the file and takes at most `LARGEST_HEADER` bytes. `check_size` and the reader of the tensors look at
    the offsets in it.
    """
    size, beginning = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(beginning, "little")
    if len(beginning) < 8 or not 0 < length <= min(size - 8, LARGEST_HEADER):
        raise FileFormatError(
            f"{path}: expected a safetensors file, whole and unchanged, got one of {size:,} bytes whose header is said "
            f"to take {length:,} of them (at most {LARGEST_HEADER:,} are read)"
        )
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: expected a safetensors file, whole and unchanged; its header could not be read: {error}"
        ) from error
    if not isinstance(header, dict):
        raise FileFormatError(f"{path}: expected a safetensors file, got one whose header is no object")
    return header


def check_size(file: BinaryIO, header: dict[str, Any], path: str | PathLike[str]) -> None:
    """Raises FileFormatError unless a file, of which just the header was read, ends where its last tensor does."""
    try:
        ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise FileFormatError(f"{path}: expected a safetensors file, got one without offsets of its tensors") from error
    size, expected = os.fstat(file.fileno()).st_size, file.tell() + max(ends, default=0)
    if size != expected:
        raise FileFormatError(
            f"{path}: expected a safetensors file, whole and unchanged, of {expected:,} bytes as in its header, "
            f"got {size:,}"
        )


def metadata_of(header: dict[str, Any], path: str | PathLike[str]) -> dict[str, str]:
    """The texts by name that a header carries. Raises FileFormatError, naming the path, for anything else there."""
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise FileFormatError(f"{path}: expected texts by name in the metadata of its header, got something else")
    return metadata


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the same name twice: {name!r:.200}")
        found[name] = value
    return found
