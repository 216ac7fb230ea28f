"""Conversations in files: one safetensors file each, versioned, checked, and written whole or not at all."""

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileFormatError
from ..extras import missing
from ..files import replace_file
from .record import Record

FORMAT = "modular-attention kv-cache"
VERSION = "1"

Layer = tuple[dict[str, Any], Record]
"""Options and contents of one layer's cache."""


def write(path: str | PathLike[str], layers: Mapping[str, Layer | None]) -> None:
    """Writes the layers, by their paths in the model, into a file: beside it first, synced, and then renamed onto it.

    None is a layer without a cache.
    """
    save = _safetensors().save
    target = Path(path)
    tensors = {
        f"{name}/{kind}": tensor
        for name, layer in layers.items()
        if layer is not None
        for kind, tensor in layer[1].tensors.items()
    }
    described = {name: layer and {"options": layer[0], "numbers": layer[1].numbers} for name, layer in layers.items()}
    metadata = {"format": FORMAT, "version": VERSION, "layers": json.dumps(described, sort_keys=True)}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata["digest"] = _digest(metadata, tensors)
    content = save(tensors, metadata)
    replace_file(target, content)


def read(path: str | PathLike[str]) -> dict[str, Layer | None]:
    """The layers in a file that `write` wrote. Raises FileFormatError, naming the file, for anything else."""
    safetensors = _safetensors()
    content = Path(path).read_bytes()
    try:
        tensors = safetensors.load(content)
        metadata = _metadata(content)
    except Exception as error:
        raise FileFormatError(
            f"{path}: expected a safetensors file, whole and unchanged, got one that says: {error}"
        ) from error
    if metadata.get("format") != FORMAT:
        raise FileFormatError(f"{path}: expected a saved kv_cache, got format {metadata.get('format')!r}")
    if metadata.get("version") != VERSION:
        raise FileFormatError(
            f"{path}: expected version {VERSION} of the format, got {metadata.get('version')!r}; "
            "read it with the release that wrote it"
        )
    digest = metadata.pop("digest", None)
    if digest != _digest(metadata, tensors):
        raise FileFormatError(f"{path}: expected the content that was saved, got a changed one; save it anew")
    described = json.loads(metadata["layers"])
    layers: dict[str, Layer | None] = dict.fromkeys(described)
    for name, layer in described.items():
        if layer is None:
            continue
        own = {key[len(name) + 1 :]: tensors[key] for key in tensors if key.rpartition("/")[0] == name}
        layers[name] = layer["options"], Record(layer["numbers"], own)
    return layers


def read_one(path: str | PathLike[str]) -> Layer:
    """The only layer in a file. Raises FileFormatError as `read`, and for a file of a whole model."""
    layers = read(path)
    layer = layers.get("")
    if layer is None or len(layers) > 1:
        raise FileFormatError(f"{path}: expected the kv_cache of one layer, got {len(layers)}; use KVCache.load")
    return layer


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of everything that the file says: bytes, shapes and dtypes by name, and the other metadata."""
    digest = hashlib.sha256()
    for key, text in sorted(metadata.items()):
        digest.update(f"{key}={text}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}: {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _metadata(content: bytes) -> dict[str, str]:
    size = int.from_bytes(content[:8], "little")
    found: dict[str, str] | None = json.loads(content[8 : 8 + size]).get("__metadata__")
    return found or {}


def _safetensors() -> Any:
    try:
        from safetensors import torch as safetensors
    except ModuleNotFoundError as error:
        raise missing("files", "saving and loading a kv_cache", error) from error
    return safetensors
