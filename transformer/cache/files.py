"""Conversations in files: one safetensors file each, versioned, checked, and written whole or not at all."""

import hashlib
import json
import os
import reprlib
from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError, CacheStateError, FileFormatError, ForeignFileError
from ..extras import missing
from ..files import open_file, replace_file
from ..tensor_files import MAX_HEADER_BYTES, check_size, metadata_of, read_header
from .validation import Layer, check_layers

FORMAT = "modular-attention kv-cache"
VERSION = "1"

LARGEST_CONVERSATION = 1 << 40
"""Bytes. The cache of a model of 400 billion parameters takes half of it for two million tokens in 16 bits."""


Digests = dict[str, str]
"""Dtype, shape and digest of each tensor of a model, by its name without wrappers."""


class SavedCache(NamedTuple):
    """Content of a file: layers by their paths in the model (None: a layer without a cache), and more.

    `weights` are digests of the model's weights; `said` is text that a program adds to the keys and values.
    """

    layers: dict[str, Layer | None]
    weights: Digests | None = None
    said: str | None = None


def write(path: str | PathLike[str], saved: SavedCache) -> None:
    """Writes a conversation into a file: beside it first, synced, and then renamed onto it.

    Raises ForeignFileError for an existing file that `write` did not write, CacheStateError for layers that are not of
    one conversation, ArgumentError for more text than `read` reads and for what is no path, and OSError where nothing
    can be written.
    """
    replace_file(path, packed(path, saved))


def packed(path: str | PathLike[str], saved: SavedCache) -> bytes:
    """The content that `write` writes into a file; raises as that does."""
    save = _safetensors().save
    _check_place(path)
    described = {
        name: layer and {"options": layer[0].fields(), "numbers": layer[1].numbers}
        for name, layer in saved.layers.items()
    }
    tensors = {
        f"{name}/{kind}": tensor.cpu().contiguous()
        for name, layer in saved.layers.items()
        if layer is not None
        for kind, tensor in layer[1].tensors.items()
    }
    try:
        check_layers(described, tensors)
    except ValueError as error:
        raise CacheStateError(f"kv_cache: cannot be saved as one conversation: {error}") from error
    metadata = {"format": FORMAT, "version": VERSION, "layers": json.dumps(described, sort_keys=True)}
    if saved.weights is not None:
        metadata["weights"] = json.dumps(saved.weights)
    if saved.said is not None:
        metadata["said"] = saved.said
    metadata["digest"] = _digest(metadata, tensors)
    content: bytes = save(tensors, metadata)
    if int.from_bytes(content[:8], "little") > MAX_HEADER_BYTES:
        raise ArgumentError(f"{path}: expected at most {MAX_HEADER_BYTES:,} bytes of text to save, got more; save less")
    return content


def read(path: str | PathLike[str]) -> SavedCache:
    """The content of a file that `write` wrote. Raises FileFormatError, naming the file, for anything else."""
    safetensors = _safetensors()
    with open_file(path, LARGEST_CONVERSATION) as file:
        # Of a file that is no conversation only the header is read.
        header = read_header(file, path)
        metadata = metadata_of(header, path)
        _check_format(metadata, path)
        check_size(file, header, path)
        file.seek(0)
        content = file.read()
    try:
        tensors = safetensors.load(content)
    except Exception as error:
        raise FileFormatError(
            f"{path}: expected a safetensors file, whole and unchanged; it could not be read: {error}"
        ) from error
    del content
    if metadata.pop("digest", None) != _digest(metadata, tensors):
        raise FileFormatError(f"{path}: expected the content that was saved, got other content; save it again")
    if unknown := metadata.keys() - {"format", "version", "layers", "weights", "said"}:
        raise FileFormatError(f"{path}: expected what this release writes, got also {sorted(unknown)}")
    try:
        layers = check_layers(_parsed(metadata, "layers"), tensors)
        weights = _weights(_parsed(metadata, "weights"))
    except ValueError as error:
        raise FileFormatError(f"{path}: {error}") from error
    return SavedCache(layers, weights, metadata.get("said"))


def read_one(path: str | PathLike[str]) -> Layer:
    """The only layer in a file. Raises FileFormatError as `read`, and for a file of a whole model."""
    layers = read(path).layers
    layer = layers.get("")
    if layer is None or len(layers) > 1:
        raise FileFormatError(f"{path}: expected the kv_cache of one layer, got {len(layers)}; use KVCache.load")
    return layer


def _check_format(metadata: Mapping[str, str], path: str | PathLike[str]) -> None:
    if metadata.get("format") != FORMAT:
        raise FileFormatError(f"{path}: expected a saved kv_cache, got format {metadata.get('format')!r:.200}")
    if metadata.get("version") != VERSION:
        raise FileFormatError(
            f"{path}: expected version {VERSION} of the format, got {metadata.get('version')!r:.200}; "
            "read it with the release that wrote it"
        )


def _check_place(path: str | PathLike[str]) -> None:
    """Raises ForeignFileError unless there is no file, an empty one, or one of this format, of any version."""
    try:
        with open_file(path, LARGEST_CONVERSATION) as file:
            if os.fstat(file.fileno()).st_size:
                found = metadata_of(read_header(file, path), path).get("format")
                if found != FORMAT:
                    raise FileFormatError(f"{path}: expected format {FORMAT!r}, got {found!r:.200}")
    except FileNotFoundError:
        return
    except FileFormatError as error:
        if not os.path.exists(path):
            return  # a name too long, or a link to itself: the write raises
        raise ForeignFileError(
            f"{path}: expected the name of a new file, or of a saved kv_cache, got something else, which is not "
            "replaced; choose another name"
        ) from error


def _parsed(metadata: Mapping[str, str], key: str) -> Any:
    """The JSON text at a key; None where there is none."""
    try:
        return json.loads(metadata.get(key, "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {key!r} of its metadata; it could not be read: {error}") from error


def _weights(described: object) -> Digests | None:
    if described is None:
        return None
    if not isinstance(described, dict) or not all(isinstance(digest, str) for digest in described.values()):
        raise ValueError(f"expected digests of weights by name, got {reprlib.repr(described)}")
    return described


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """The digest of all content: bytes, shapes and dtypes by name, and the other metadata."""
    digest = hashlib.sha256()
    for key, text in sorted(metadata.items()):
        digest.update(f"{key}={text}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}: {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _safetensors() -> Any:
    try:
        from safetensors import torch as safetensors
    except ModuleNotFoundError as error:
        raise missing("files", "saving and loading a kv_cache", error) from error
    return safetensors
