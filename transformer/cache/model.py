"""KV cache of a whole model: one conversation, its rows and its files."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from os import PathLike

import torch
from typing_extensions import Self

from ..codecs import CacheDtypes
from ..errors import ArgumentError, shown
from . import files
from .call import CacheCall
from .holder import CacheSlot
from .installation import InstallableCache
from .layer import LayerCache
from .lease import exchange
from .offload import offload
from .origin import Origin
from .snapshot import snapshot_of
from .standalone import Expected, new_layers
from .transaction import Transaction


class KVCache(InstallableCache):
    """One conversation of a whole model: the cache of each of its attention modules, by module path.

    `KVCache.from_model(model)` is a live view: it shows, and changes, the caches of the modules. `remove` takes them
    out of the model, which is then empty; `install` puts them into it, or into another one with the same weights. So
    one model serves many conversations, one at a time.

    Without a model: `KVCache(num_layers=, num_kv_heads=, head_dim=)` is filled by the caller: `update` and `get`.

    Args:
        num_layers, num_kv_heads, head_dim: how many layers there are, `G` and `D`.
        max_length: the most tokens that a layer may cache; its buffers are then allocated once.
        dtype, device: those of all tensors; None: as the first ones that come. Nothing is allocated before these.
        cache_dtype: how keys and values are stored, as in the attention modules; None: as they come.

    Raises ArgumentError for sizes that are no whole numbers of at least 1, and for a `cache_dtype` that there is not.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        cache_dtype: CacheDtypes = None,
    ) -> None:
        layers = new_layers(num_layers, num_kv_heads, head_dim, max_length, cache_dtype)
        slots = {str(number): CacheSlot(cache) for number, cache in enumerate(layers)}
        self._begin(slots, Expected.of(dtype, device), Origin())

    def fork(self) -> "KVCache":
        """A second conversation that begins with all that this one has seen. It costs nothing until one side writes."""
        caches = {name: slot.cache for name, slot in self._slots.items()}
        forks = {name: None if cache is None else cache.fork() for name, cache in caches.items()}
        slots = {name: CacheSlot(cache) for name, cache in forks.items()}
        return self._of(slots, self._expected, self._origin.marked())

    def split(self) -> "list[KVCache]":
        """A fork of each row alone, in order; this conversation goes on. None before the first token."""
        first = self.fork()
        return [first.fork().select([row]) for row in range(self.batch or 0)]

    @classmethod
    def join(cls, caches: "Sequence[KVCache]") -> "KVCache":
        """The rows of conversations of different lengths in one running batch; they themselves stay as they are.

        One that has read nothing yet is one row of length 0; where none has read anything, the result has not either,
        and takes as many rows as its first call has. A source of cross-attention that one of them has not kept is
        projected anew. Raises ArgumentError, DtypeError or DeviceError where they cannot stand in one batch.
        """
        _check_caches(caches)
        names = caches[0]._slots.keys()
        for cache in caches:
            if cache._slots.keys() != names:
                differing = sorted(cache._slots.keys() ^ names)
                raise ArgumentError(
                    f"caches: expected all to be of the model of the first, got one that differs in {differing}"
                )
        rows = [cache.batch or 1 for cache in caches]
        joint = {name: CacheSlot(_joined([cache._slots[name].cache for cache in caches], rows)) for name in names}
        origin, *others = (cache._origin.marked() for cache in caches)
        return cls._of(joint, caches[0]._expected, origin if all(other == origin for other in others) else None)

    def transaction(self) -> AbstractContextManager[None]:
        """A context in which an exception leaves every cache as it was before: for models that the caller composed."""
        return Transaction(self._slots.values())

    def freeze_layout(self) -> "KVCache":
        """Lays out every layer for compiled steps (`torch.compile(model, fullgraph=True)`), one graph at any length.

        Raises, before anything changes, ArgumentError where a layer has no maximum length, and CacheStateError where
        one was compressed.
        """
        for name, cache in self.layers.items():
            if cache.max_length is None:
                raise ArgumentError(
                    f"max_length: expected a number in every layer, got None in {name!r}; "
                    "build its module with max_cache_length"
                )
            cache.check_can_freeze()
        # All layers at once, as in every operation.
        found = [(cache, "contents", cache.contents) for cache in self.layers.values()]
        exchange(found, [change for cache, _, contents in found for change in cache.frozen(contents)])
        return self

    # --- files ----------------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the conversation into one safetensors file, whole or not at all: beside it, synced, then renamed.

        The cached tokens go in, with lengths, shapes, windows and position schemes. Weights do not, but digests of
        those that its model has now, as long as that lives and has not changed since the conversation left it. An
        existing file of a kv_cache is replaced, and keeps its mode; a link is followed. Raises ArgumentError for what
        is no path, ForeignFileError for any other file, OSError where none can be written, CacheStateError where
        layers have different numbers of rows, and ModuleNotFoundError without the extra `files`.
        """
        files.write(path, self.saved())

    def saved(self) -> files.SavedCache:
        """The content that `save` writes."""
        caches = {name: slot.cache for name, slot in self._slots.items()}
        layers = {
            name: None if cache is None else (cache.spec, snapshot_of(cache.contents)) for name, cache in caches.items()
        }
        return files.SavedCache(layers, self._origin.weights())

    def offload(self, path_or_device: str | PathLike[str] | torch.device) -> Self:
        """Moves the conversation into a file or to another device, from where it comes back by itself.

        `nbytes` is then 0; lengths and rows stay known. The first call or operation that reads keys or values, in a
        model or outside, brings them back to the device that they were on: each layer reads its own tensors.

        A `torch.device`, and text that `torch.device` accepts ("cpu", "cuda:1"), is a device; other text and every
        `PathLike` is a path (of a file named cpu: "./cpu"). The file is the one that `save` writes, whole or not at
        all, and it stays there; each conversation needs one of its own. Until all layers are back, they raise
        CacheStateError, naming the file, while it is missing, and FileFormatError while it has other content. Nothing
        is lost then: once the file is put back, the conversation continues.

        A frozen layout comes back in order of position. Memory that a fork shares is freed with the fork, and what an
        open transaction may return to with the transaction.

        Raises, before anything changes: ArgumentError for a device on which the whole conversation is already, and for
        one that keeps no numbers (meta); DeviceError for a device that this machine does not have; CacheStateError
        where a layer carries gradients (`detach()` first); ConcurrentUseError while a call is running; and, for a path,
        as `save` does.
        """
        call = CacheCall()
        try:
            for slot in self._slots.values():
                call.mark_in_use(slot)
            caches = {name: slot.cache for name, slot in self._slots.items()}
            offload(caches, path_or_device, self._origin.weights)
        finally:
            call.done = True
        return self

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "KVCache":
        """The conversation in a file, on the CPU; `install` puts it into the model, and checks that it fits.

        Raises FileFormatError, naming the file, for anything but a whole and unchanged file of this format and version
        whose options and numbers go with its tensors, ArgumentError for what is no path, and OSError where no
        file can be read.
        """
        return cls.of_saved(files.read(path))

    @classmethod
    def of_saved(cls, saved: files.SavedCache) -> "KVCache":
        """The conversation in the content of a file, whose tensors are its own from now on."""
        layers = saved.layers.items()
        caches = {name: None if layer is None else LayerCache.from_snapshot(*layer) for name, layer in layers}
        slots = {name: CacheSlot(cache) for name, cache in caches.items()}
        return cls._of(slots, origin=Origin(digests=saved.weights))

    def __repr__(self) -> str:
        kinds = dict.fromkeys(cache.cache_dtype for cache in self.layers.values())
        stored = "" if kinds.keys() <= {None} else f"cache_dtype={' or '.join(map(str, kinds))}, "
        return (
            f"KVCache(layers={len(self.layers)}, length={self.length}, cached_length={self.cached_length}, "
            f"{stored}nbytes={self.nbytes})"
        )


def _check_caches(caches: object) -> None:
    if not isinstance(caches, Sequence) or not caches:
        raise ArgumentError(f"caches: expected a list of at least one KVCache, got {shown(caches)}")
    for cache in caches:
        if not isinstance(cache, KVCache):
            raise ArgumentError(f"caches: expected KVCaches, got {type(cache).__name__}")


def _joined(caches: Sequence[LayerCache | None], rows: Sequence[int]) -> LayerCache | None:
    """One layer's rows in one batch; None where nothing is there, or sources alone of which some were forgotten."""
    spec = next((cache.spec for cache in caches if cache is not None), None)
    if spec is None:
        return None
    every = [LayerCache.of(spec) if cache is None else cache for cache in caches]
    joined = LayerCache.joined(every, rows)
    return joined if any(joined.contents.kinds) or all(cache is not None for cache in caches) else None
