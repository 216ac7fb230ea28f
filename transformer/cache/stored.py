"""Contents that are stored on another device or in a file: a snapshot whose tensors are read when they come back."""

import os
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CacheStateError, FileFormatError
from ..files import open_file, replace_file
from ..tensor_files import places_of
from . import files
from .buffers import allocated
from .contents import CacheContents
from .elsewhere import Elsewhere
from .snapshot import SELF, Snapshot, from_snapshot, snapshot_of
from .spec import CacheSpec


class Room(NamedTuple):
    """Room for a stored tensor: a tensor of size `allocated`, of which it is the first part when it is back."""

    shape: torch.Size
    allocated: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor, slots: int | None = None) -> "Room":
        """For a tensor, with so many slots [B, G, slots, D]; None: with no more than it has."""
        allocated = tensor.shape if slots is None else torch.Size((*tensor.shape[:2], slots, *tensor.shape[3:]))
        return cls(tensor.shape, allocated, tensor.dtype, tensor.device)

    def zeros(self) -> Tensor:
        """The tensor of this room, without what is stored."""
        return torch.zeros(self.allocated, dtype=self.dtype, device=self.device)

    def part(self, tensor: Tensor) -> Tensor:
        """The part of it that is stored."""
        return tensor[tuple(map(slice, self.shape))]


class Stored(Elsewhere):
    """Contents as a snapshot without its tensors."""

    def __init__(self, spec: CacheSpec, contents: CacheContents, snapshot: Snapshot) -> None:
        super().__init__(contents)
        self._spec, self._numbers, self._rest = spec, snapshot.numbers, contents._replace(state=None, source=None)
        # They serve the same module again: a source that is unchanged need not be projected anew.
        source = None if contents.source is None else contents.source.mapped(lambda tensor: tensor)
        self._projections = None if source is None else source.projections
        self._rooms = {name: Room.of(tensor) for name, tensor in snapshot.tensors.items()}
        for name in self._rooms.keys() & SELF[:2]:
            # With slots for the next tokens: the first call need not copy those before.
            tensor, window = snapshot.tensors[name], snapshot.numbers["window"]
            self._rooms[name] = Room.of(tensor, spec.room(tensor.shape[2], 0, window, contents.reserved))

    def contents(self) -> CacheContents:
        """New contents, on the device where they were."""
        rooms = self._rooms
        with torch.inference_mode(False), torch.no_grad():
            tensors = {name: room.zeros() for name, room in rooms.items()}
            self.read({name: rooms[name].part(tensor) for name, tensor in tensors.items()})
        back = from_snapshot(self._spec, Snapshot(self._numbers, tensors))
        source = back.source and replace(back.source, projections=self._projections)
        return self._rest._replace(state=back.state, source=source)

    @abstractmethod
    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Fills each tensor with the stored one of its name and shape."""


class OnDevice(Stored):
    """Contents on another device, without unused slots."""

    def __init__(self, spec: CacheSpec, contents: CacheContents, snapshot: Snapshot, device: torch.device) -> None:
        super().__init__(spec, contents, snapshot)
        with torch.inference_mode(False), torch.no_grad():
            self._there = {name: tensor.to(device) for name, tensor in snapshot.tensors.items()}

    @classmethod
    def of(cls, spec: CacheSpec, contents: CacheContents, device: torch.device) -> "OnDevice":
        """These contents, copied there."""
        return cls(spec, contents, snapshot_of(contents), device)

    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Copies them back."""
        for name, target in targets.items():
            target.copy_(self._there[name])


class Place(NamedTuple):
    """Place of a tensor in a file, and a checksum of its bytes, CRC-32: it detects mistakes, not attacks.

    (A SHA-256 takes three times as long: longer than reading.)
    """

    start: int
    crc32: int


class InFile(Stored):
    """Contents of one layer in the file of a conversation, by its absolute path: the working directory may change."""

    def __init__(
        self, spec: CacheSpec, contents: CacheContents, snapshot: Snapshot, path: str, places: Mapping[str, Place]
    ) -> None:
        super().__init__(spec, contents, snapshot)
        self._path, self._places = os.path.abspath(path), places

    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Reads the tensors of this layer alone, each by its place and with its checksum.

        Raises CacheStateError where the file cannot be read, and FileFormatError where it has other content.
        """
        try:
            with open_file(self._path, files.LARGEST_CONVERSATION) as file:
                intact = all(_read(file, target, *self._places[name]) for name, target in targets.items())
        except OSError as error:
            raise CacheStateError(
                f"kv_cache: its tokens were moved to {self._path} by offload(), which could not be read: {error}; put "
                "the file back and repeat this, or set kv_cache = None to begin anew"
            ) from error
        if not intact:
            raise FileFormatError(
                f"{self._path}: expected what offload() wrote, the tokens of a kv_cache, got other content; put that "
                "file back and repeat this, or set kv_cache = None to begin anew"
            )


def in_file(path: str, saved: files.SavedCache, contents: Mapping[str, CacheContents]) -> dict[str, InFile]:
    """The layers that have anything, in a file that is written now; raises as `files.write`."""
    content = files.packed(path, saved)
    view, places = memoryview(content), places_of(content)
    moved = {}
    for name, layer in saved.layers.items():
        if layer is not None and layer[1].tensors:
            own = {kind: places[f"{name}/{kind}"] for kind in layer[1].tensors}
            checked = {kind: Place(place.start, zlib.crc32(view[place])) for kind, place in own.items()}
            moved[name] = InFile(layer[0], contents[name], layer[1], path, checked)
    replace_file(path, content)
    return moved


def tensors_of(contents: CacheContents) -> list[Tensor]:
    """Every tensor of some contents that takes memory."""
    own = () if contents.state is None else contents.state.tensors
    return [*own, *(() if contents.source is None else contents.source.tensors)]


def allocated_bytes(every: Iterable[CacheContents]) -> int:
    """Bytes allocated for the contents of several caches; memory that they share is counted once."""
    return allocated(tensor for contents in every for tensor in tensors_of(contents))


def _read(file: Any, target: Tensor, start: int, crc32: int) -> bool:
    """Fills a tensor with the bytes of a file from `start` on; False where they have another checksum."""
    here = target if target.is_cpu else torch.empty(target.shape, dtype=target.dtype, device="cpu")
    file.seek(start)
    found = 0
    for block in _blocks(here):
        if file.readinto(block) != len(block):
            return False
        found = zlib.crc32(block, found)
    if here is not target:
        target.copy_(here)
    return found == crc32


def _blocks(tensor: Tensor) -> Iterator[Any]:
    """The bytes of a tensor in contiguous parts, in order: where it is the first slots of more, one part a head."""
    for part in [tensor] if tensor.is_contiguous() else tensor.view(-1, *tensor.shape[2:]):
        yield part.view(-1).view(torch.uint8).numpy()
