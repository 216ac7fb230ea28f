"""The tensors of a checkpoint: of one file or several shards, safetensors by memory map, pickles only where allowed."""

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
from .limits import LARGEST_SHARD

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

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A tensor that shares the file's memory, to be read."""

    @abstractmethod
    def release(self) -> None:
        """Gives the memory back that reading has taken, as far as no tensor of this file is held."""


class SafetensorsShard(Shard):
    """A safetensors file, of which only what is read comes into memory."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.shapes, self.dtypes = {}, {}
        safe_open = import_safetensors().safe_open
        with open_file(file, LARGEST_SHARD) as opened:
            read_header(opened, file)
        with _naming(file):
            self._open: Any = safe_open(file, "pt")
            for name in list(self._open.keys()):
                described = self._open.get_slice(name)
                self.shapes[name] = tuple(described.get_shape())
                self.dtypes[name] = DTYPES.get(described.get_dtype(), described.get_dtype())

    def tensor(self, name: str) -> Tensor:
        with _naming(self.file):
            found: Tensor = self._open.get_tensor(name)
        return found

    def release(self) -> None:
        with _naming(self.file):
            self._open = import_safetensors().safe_open(self.file, "pt")


class PickledShard(Shard):
    """A file of `torch.save`, read without running anything that it may contain."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with open_file(file, LARGEST_SHARD):
            pass
        with _naming(file):
            # Files of before torch 1.6 are no archives, and cannot be mapped.
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if not isinstance(found, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
        ):
            raise FileFormatError(f"{file}: expected tensors by name, got {type(found).__name__} of something else")
        if odd := [name for name, tensor in found.items() if not _is_plain(tensor)]:
            raise FileFormatError(f"{file}: expected tensors of plain numbers, got others: {listed(odd)}")
        self._tensors: dict[str, Tensor] = found
        self.shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in found.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def release(self) -> None:
        """It is one mapping from beginning to end."""


def open_shards(folder: Folder, *, allow_pickle: bool) -> dict[str, Shard]:
    """The shard of each tensor by name.

    Raises FileFormatError for folders without weights, for pickles where they are not allowed, and for shards that are
    missing, torn, outside of the folder, or do not hold what the index says.
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
            f"{index}, weight_map: expected each tensor once, where the index says; not so: {listed(wrong)}"
        )
    return {tensor: shards[name] for tensor, name in places.items()}


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Whatever a reader says of a file that is not as it was written, with the file's name."""
    try:
        yield
    except (FileFormatError, ModuleNotFoundError):
        raise
    except pickle.UnpicklingError as error:
        raise FileFormatError(f"{file}: expected weights and nothing else; it could not be read: {error}") from error
    except Exception as error:
        raise FileFormatError(f"{file}: expected a whole file of tensors; it could not be read: {error}") from error


def import_safetensors() -> Any:
    """The package, with its `torch` module."""
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise missing("checkpoints", "reading and writing a checkpoint", error) from error
    return safetensors
