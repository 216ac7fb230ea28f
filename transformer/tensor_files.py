"""Headers of safetensors files: reading and checking.

A header is checked before the tensors of its file are read. The format (https://github.com/huggingface/safetensors):
8 bytes with the length of the header, the header as a JSON object, and the bytes of the tensors.
"""

import json
import os
from os import PathLike
from typing import Any, BinaryIO

from .errors import FileFormatError

MAX_HEADER_BYTES = 1 << 24
"""Upper limit of a header, in bytes; once parsed it takes up to twenty times as many. A header of this size describes
about 200,000 tensors, or the text of about two million tokens."""


def read_header(file: BinaryIO, path: str | PathLike[str]) -> dict[str, Any]:
    """The header of a safetensors file that is open at its beginning.

    Raises FileFormatError, with the path, unless the header lies within the file, has at most `MAX_HEADER_BYTES`
    bytes, and is a JSON object in which no name occurs twice. The offsets in it are checked by `check_size` and by
    the reader of the tensors.
    """
    size, beginning = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(beginning, "little")
    if len(beginning) < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
        raise FileFormatError(
            f"{path}: expected a complete safetensors file, got {size:,} bytes with a header length of {length:,} "
            f"(at most {MAX_HEADER_BYTES:,} are read)"
        )
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: expected a complete safetensors file; its header could not be read: {error}"
        ) from error
    if not isinstance(header, dict):
        raise FileFormatError(f"{path}: expected a safetensors file, got a header that is not a JSON object")
    return header


def check_size(file: BinaryIO, header: dict[str, Any], path: str | PathLike[str]) -> None:
    """Raises FileFormatError unless `file` ends with its last tensor. The file must be open behind its header."""
    try:
        ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise FileFormatError(f"{path}: expected a safetensors file, got a header without tensor offsets") from error
    size, expected = os.fstat(file.fileno()).st_size, file.tell() + max(ends, default=0)
    if size != expected:
        raise FileFormatError(
            f"{path}: expected a complete safetensors file of {expected:,} bytes, as its header says, got {size:,}"
        )


def places_of(content: bytes) -> dict[str, slice]:
    """Where the bytes of each tensor are in the content of a safetensors file, which this process has made."""
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__", None)
    return {name: slice(*(begin + at for at in tensor["data_offsets"])) for name, tensor in header.items()}


def metadata_of(header: dict[str, Any], path: str | PathLike[str]) -> dict[str, str]:
    """The metadata of a header, texts by name. Raises FileFormatError, with the path, for other metadata."""
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise FileFormatError(f"{path}: expected texts by name as the metadata of the header, got something else")
    return metadata


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the same name twice: {name!r:.200}")
        found[name] = value
    return found
