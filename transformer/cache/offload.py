"""Offload of a conversation to a file or to another device, from where each layer comes back at its first use."""

import os
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Protocol

import torch

from ..errors import ArgumentError, CacheStateError, DeviceError, shown
from ..files import is_path
from . import files
from .contents import CacheContents
from .elsewhere import Elsewhere
from .lease import Attribute, exchange
from .snapshot import snapshot_of
from .spec import CacheSpec
from .stored import OnDevice, in_file, tensors_of


class Cache(Protocol):
    """The cache of one layer."""

    spec: CacheSpec
    contents: CacheContents

    def moved_away(self, elsewhere: Elsewhere) -> Attribute:
        """The change that frees its contents, which are elsewhere."""


Found = Mapping[str, tuple[Cache, CacheContents]]
"""The caches of a conversation by layer, each with its contents."""


def offload(
    caches: Mapping[str, Cache | None],
    path_or_device: str | PathLike[str] | torch.device,
    weights: Callable[[], files.Digests | None] = lambda: None,
) -> None:
    """Moves the contents of all layers of a conversation, or of none; see `KVCache.offload`.

    `caches` are those of its layers, by name; `weights` gives the digests for its file.
    """
    target = _target(path_or_device)
    found = {name: (cache, cache.contents) for name, cache in caches.items() if cache is not None}
    for name, (_, contents) in found.items():
        if any(tensor.requires_grad for tensor in tensors_of(contents)):
            raise CacheStateError(
                f"kv_cache: expected one without gradients to offload, got some in {name or 'it'}; detach() it first"
            )
    if isinstance(target, torch.device):
        moved = _to_device(found, target)
    else:
        layers = {name: (cache.spec, snapshot_of(contents)) for name, (cache, contents) in found.items()}
        saved = files.SavedCache({name: layers.get(name) for name in caches}, weights())
        moved = in_file(target, saved, {name: contents for name, (_, contents) in found.items()})
    changes = [found[name][0].moved_away(elsewhere) for name, elsewhere in moved.items()]
    exchange([(cache, "contents", contents) for cache, contents in found.values()], changes)


def _to_device(found: Found, device: torch.device) -> Mapping[str, Elsewhere]:
    """The layers that have anything, on a device. Those that are there already stay as they are.

    Raises ArgumentError where this is all of them.
    """
    there = {
        name: (cache, contents)
        for name, (cache, contents) in found.items()
        if any(tensor.device != device for tensor in tensors_of(contents))
    }
    if not there and any(contents.like is not None for _, contents in found.values()):
        raise ArgumentError(
            "path_or_device: expected another device than that of the kv_cache, since nothing would be freed, got "
            f"{device}; offload it to a file"
        )
    # One after the other: their copies without unused slots take memory of the device that is to be freed.
    return {name: OnDevice.of(cache.spec, contents, device) for name, (cache, contents) in there.items()}


def _target(path_or_device: object) -> torch.device | str:
    """The device that is meant, with its index, or the path as text.

    Raises ArgumentError for anything else, and for a device that keeps no numbers; DeviceError for one that there is
    not.
    """
    device = path_or_device
    if isinstance(device, str):
        try:
            device = torch.device(device)
        except RuntimeError:
            return device
    if isinstance(device, PathLike) and is_path(device):
        return str(os.fspath(device))
    if not isinstance(device, torch.device):
        raise ArgumentError(
            "path_or_device: expected the name of a file, as a str or a pathlib.Path, or a torch.device, got "
            f"{shown(device)}"
        )
    if device.type == "meta":
        raise ArgumentError("path_or_device: expected a device that keeps numbers, got meta; a file is './meta'")
    try:
        return torch.empty(0, device=device).device
    except Exception as error:
        raise DeviceError(
            f"path_or_device: expected a device of this machine, got {device}, of which PyTorch says: "
            f"{error!s:.200}; a file is './{device}'"
        ) from error
