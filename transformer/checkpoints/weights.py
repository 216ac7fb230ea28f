"""Tensors of a checkpoint in one or several files: memory-mapped safetensors, or pickles if they are allowed."""

import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileFormatError
from ..extras import missing
from ..files import open_file
from ..tensor_files import read_header
from .documents import listed, read_object
from .folder import Folder
from .limits import MAX_SHARD_BYTES
from .names import Region

WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"

DTYPES: dict[str, torch.dtype | str] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Shard(ABC):
    """One file of tensors."""

    file: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype | str]
    copies = False
    """Whether parts are in memory of their own."""

    @abstractmethod
    def part(self, name: str, region: Region, *, stays: bool) -> Tensor:
        """A part of a tensor for reading, which shares the memory of the file; `stays`: it is kept in use."""

    @abstractmethod
    def release(self) -> None:
        """Releases the memory of read pages, except those of tensors that stay."""


class SafetensorsShard(Shard):
    """A memory-mapped safetensors file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.shapes, self.dtypes = {}, {}
        safe_open = import_safetensors().safe_open
        with open_file(file, MAX_SHARD_BYTES) as opened:
            read_header(opened, file)
        with _naming(file):
            # Two mappings: the pages of one stay as long as any tensor of it does.
            self._staying: Any = safe_open(file, "pt")
            self._passing: Any = None
            for name in list(self._staying.keys()):
                described = self._staying.get_slice(name)
                self.shapes[name] = tuple(described.get_shape())
                self.dtypes[name] = DTYPES.get(described.get_dtype(), described.get_dtype())

    def part(self, name: str, region: Region, *, stays: bool) -> Tensor:
        with _naming(self.file):
            if not stays and self._passing is None:
                self._passing = import_safetensors().safe_open(self.file, "pt")
            found: Tensor = (self._staying if stays else self._passing).get_slice(name)[region]
        return _by_itself(found) if stays and found.is_contiguous() else found

    def release(self) -> None:
        self._passing = None


class PickledShard(Shard):
    """A file of `torch.save`, loaded with `weights_only=True`, so that no code in it runs."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with open_file(file, MAX_SHARD_BYTES):
            pass
        with _naming(file):
            # Files from before torch 1.6 are not archives and cannot be memory-mapped.
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if not isinstance(found, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
        ):
            raise FileFormatError(f"{file}: expected tensors by name, got {type(found).__name__} of other values")
        if odd := [name for name, tensor in found.items() if not _is_plain(tensor)]:
            raise FileFormatError(f"{file}: expected tensors of plain numbers, got others: {listed(odd)}")
        self._tensors: dict[str, Tensor] = found
        self.shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in found.items()}

    def part(self, name: str, region: Region, *, stays: bool) -> Tensor:  # noqa: ARG002 (one mapping)
        return self._tensors[name][region]

    def release(self) -> None:
        """Does nothing: the file is one mapping, which stays."""


def open_shards(folder: Folder, *, allow_pickle: bool) -> dict[str, Shard]:
    """The shard of each tensor by name.

    Raises FileFormatError for a folder without weights, for pickles that are not allowed, and for shards that are
    missing, damaged, outside of the folder, or differ from the index.
    """
    for name, kind in ((WEIGHTS, SafetensorsShard), *(((PICKLED, PickledShard),) if allow_pickle else ())):
        file = folder.find(name)
        if file is not None:
            shard = kind(file)
            return dict.fromkeys(shard.shapes, shard)
        index = folder.find(f"{name}.index.json")
        if index is not None:
            return _indexed(folder, index, kind)
    pickles = "" if allow_pickle else "; pickled weights (.bin, .pt) are read with allow_pickle=True only"
    raise FileFormatError(f"{folder.path}: expected {WEIGHTS} or {WEIGHTS}.index.json, got neither{pickles}")


def _indexed(folder: Folder, index: Path, kind: type[SafetensorsShard] | type[PickledShard]) -> dict[str, Shard]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise FileFormatError(f"{index}, weight_map: expected names of files by tensor")
    files = {name: folder.get(name) for name in sorted(set(places.values()))}
    suffix = Path(WEIGHTS if kind is SafetensorsShard else PICKLED).suffix
    if wrong := [name for name in files if Path(name).suffix != suffix]:
        raise FileFormatError(f"{index}, weight_map: expected files that end in {suffix}, got {listed(wrong)}")
    shards = {name: kind(file) for name, file in files.items()}
    found = {tensor: name for name, shard in shards.items() for tensor in shard.shapes}
    if found != places or len(found) != sum(len(shard.shapes) for shard in shards.values()):
        wrong = [name for name in {*found, *places} if found.get(name) != places.get(name)]
        raise FileFormatError(
            f"{index}, weight_map: expected each tensor once, in the file that the index says, got others: "
            f"{listed(wrong)}"
        )
    return {tensor: shards[name] for tensor, name in places.items()}


def _by_itself(tensor: Tensor) -> Tensor:
    """The same memory, in a storage that has nothing else: of the part of a tensor, `torch.save` writes that part."""
    start = tensor.storage_offset() * tensor.itemsize
    storage: Any = tensor.untyped_storage()[start : start + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(storage, 0, tensor.shape, tensor.stride())


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turns errors of a reader into a FileFormatError with the file."""
    try:
        yield
    except (FileFormatError, ModuleNotFoundError):
        raise
    except pickle.UnpicklingError as error:
        raise FileFormatError(f"{file}: expected only weights; the file could not be read: {error}") from error
    except Exception as error:
        raise FileFormatError(f"{file}: expected a complete file of tensors; it could not be read: {error}") from error


def import_safetensors() -> Any:
    """The package, with its `torch` module."""
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise missing("checkpoints", "reading and writing a checkpoint", error) from error
    return safetensors
