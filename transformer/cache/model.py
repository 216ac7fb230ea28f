"""The caches of a whole model as one conversation."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from os import PathLike

import torch
from torch import nn
from typing_extensions import Self

from ..errors import ArgumentError, CacheStateError
from . import files
from .call import active_call
from .exchange import exchange
from .holder import CacheHolder, holders
from .layer import LayerCache
from .origin import Origin
from .slot import CacheSlot
from .snapshot import snapshot_of
from .standalone import Expected, StandaloneCache, new_layers
from .transaction import Transaction


class KVCache(StandaloneCache):
    """One conversation of a whole model: the cache of each of its attention modules, by module path.

    `KVCache.from_model(model)` is a live view: it shows, and changes, what the modules own. `remove` takes the caches
    out of the model, which is then empty; `install` puts them into it, or into another one with the same weights. So
    one model holds many conversations, one at a time.

    Without a model: `KVCache(num_layers=, num_kv_heads=, head_dim=)` is fed by hand, with `update` and `get`.

    Args:
        num_layers, num_kv_heads, head_dim: how many layers there are, `G` and `D`.
        max_length: most tokens that a layer may hold; its buffers are then allocated once.
        dtype, device: those of all tensors; None: as the first ones that come. Nothing is allocated before these.

    Raises ArgumentError for sizes that are no whole numbers of at least 1.
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
    ) -> None:
        layers = new_layers(num_layers, num_kv_heads, head_dim, max_length)
        slots = {str(number): CacheSlot(cache) for number, cache in enumerate(layers)}
        self._begin(slots, Expected.of(dtype, device), Origin())

    @classmethod
    def _of(
        cls, slots: Mapping[str, CacheSlot], expected: Expected | None = None, origin: Origin | None = None
    ) -> "KVCache":
        cache = cls.__new__(cls)
        cache._begin(slots, expected or Expected(), origin or Origin())
        return cache

    def _begin(self, slots: Mapping[str, CacheSlot], expected: Expected, origin: Origin) -> None:
        self._expected = expected
        self._origin = origin
        self._slots = dict(slots)
        self._holders: dict[str, CacheHolder] = {}
        self._model: nn.Module | None = None  # as long as this is its live view, so that its weights can be told
        self._numbered = _by_number(slots)

    # --- a model's conversations ----------------------------------------------------------------------------------

    @classmethod
    def from_model(cls, model: nn.Module) -> "KVCache":
        """The live view of every cache in a model. Raises ArgumentError for a model without attention.

        Within a generation, such as in a forward hook, it shows that generation's caches.
        """
        found, call = holders(model), active_call()
        slots = {name: holder.slot if call is None else call.slot(holder) for name, holder in found.items()}
        view = cls._of({name: slot or CacheSlot() for name, slot in slots.items()}, origin=Origin.of(model))
        view._holders, view._model, view._numbered = found, model, ()
        return view

    @classmethod
    def of_slots(cls, slots: Mapping[str, CacheSlot]) -> "KVCache":
        """The conversation in these slots, by module path."""
        return cls._of(slots)

    def remove(self, model: nn.Module) -> "KVCache":
        """Takes the conversation out of its model, which is then empty, and returns it.

        Raises CacheStateError where it is not in this model.
        """
        found = holders(model)
        if not self._is_in(found):
            raise CacheStateError("model: expected the one that this conversation is in; it is not, or not any more")
        slots = {name: CacheSlot(holder.slot.cache) for name, holder in found.items()}
        expected = [(holder.slot, "cache", slots[name].cache) for name, holder in found.items()]
        empty = [(holder.slot, "cache", None) for holder in found.values()]
        origin = self._origin.marked()
        exchange(expected, [*empty, (self, "_slots", slots), (self, "_holders", {})])
        self._numbered, self._origin, self._model = _by_number(slots), origin, None
        return self

    def install(self, model: nn.Module, *, check_weights: bool = False) -> "KVCache":
        """Puts the conversation into a model, and becomes the live view of it.

        Layers, shapes, position schemes and windows are always compared. `check_weights=True` compares the weights too:
        with those of the model that the conversation comes from, while that lives and has not changed since the
        conversation was taken out or forked, or with the digests that its file has of them. It reads every weight once
        (135 million float32 in 0.4 s of one core), but for the very model that the conversation was taken from, of
        which versions and addresses are compared. A model that was cast has other weights. Without the check, the
        conversation counts as one of this model from then on.

        Raises CacheStateError where the model holds a conversation or its caches are off, and ArgumentError, naming the
        differences, where it is not like the one that this conversation comes from, or nobody knows that one's weights.
        Nothing has changed then.
        """
        found = holders(model)
        if self._is_in(found):
            return self
        if self._holders:
            raise CacheStateError("install: this conversation is in another model; remove() it there first")
        caches = self.layers
        differences = [f"{name!r} is not in the model" for name in self._slots if name not in found]
        differences += [f"{name!r} is not in the conversation" for name in found if name not in self._slots]
        for name in caches.keys() & found.keys():
            differences += _differences(name, caches[name], found[name].new_cache())
        if differences:
            raise ArgumentError(
                f"model: expected a model with the layers that made this cache; differences: {'; '.join(differences)}"
            )
        if check_weights:
            self._origin.check(model)
        if off := [name for name in caches if not found[name].use_kv_cache]:
            raise CacheStateError(
                f"model: expected its caches to be on, since no call would read the conversation, but they are off in "
                f"{off[:3]}; enable_cache() and eval(), or set use_kv_cache of the modules, first"
            )
        if any(holder.slot.cache is not None for holder in found.values()):
            raise CacheStateError(
                "model: expected one without a conversation; KVCache.from_model(model).remove(model) it"
            )
        changes = [(found[name].slot, "cache", cache) for name, cache in caches.items()]
        slots = {name: holder.slot for name, holder in found.items()}
        expected = [(slot, "cache", None) for slot in slots.values()]
        exchange(expected, [*changes, (self, "_slots", slots), (self, "_holders", found)])
        self._numbered, self._origin, self._model = (), Origin.of(model), model
        return self

    @contextmanager
    def installed(self, model: nn.Module) -> "Iterator[KVCache]":
        """A context in which the conversation is in `model`; whatever ends it, the conversation is out again.

        Raises as `install` does.
        """
        try:
            yield self.install(model)
        finally:
            if self._is_in(holders(model)):
                self.remove(model)

    def _is_in(self, found: Mapping[str, CacheHolder]) -> bool:
        return bool(self._holders) and self._slots == {name: holder.slot for name, holder in found.items()}

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

        A source of cross-attention that one of them has not kept is projected anew. Raises ArgumentError, DtypeError or
        DeviceError where they cannot stand in one batch.
        """
        _check_caches(caches)
        names = caches[0]._slots.keys()
        for cache in caches:
            if cache._slots.keys() != names:
                differing = sorted(cache._slots.keys() ^ names)
                raise ArgumentError(
                    f"caches: expected all to be of the model of the first, got one that differs in {differing}"
                )
            if cache.batch is None:
                raise ArgumentError("caches: expected all to have seen tokens, got one that has not")
        joint = {name: CacheSlot(_joined([cache._slots[name].cache for cache in caches])) for name in names}
        origin, *others = (cache._origin.marked() for cache in caches)
        return cls._of(joint, caches[0]._expected, origin if all(other == origin for other in others) else None)

    def reserve(self, tokens: int) -> Self:
        """Makes room for so many tokens more in every layer, also in those whose first token is still to come.

        Raises as that of one layer does; no layer has changed then.
        """
        empty = [h for h in self._holders.values() if h.use_kv_cache and h.slot.cache is None]
        begun = [(holder.slot, "cache", holder.new_cache().reserve(tokens)) for holder in empty]
        super().reserve(tokens)
        exchange([(holder.slot, "cache", None) for holder in empty], begun)
        return self

    def transaction(self) -> AbstractContextManager[None]:
        """A context in which an exception leaves every cache as it was before: for models that are composed by hand."""
        return Transaction(self._slots.values())

    def freeze_layout(self) -> "KVCache":
        """Lays out every layer for compiled steps (`torch.compile(model, fullgraph=True)`), one graph at any length.

        Raises ArgumentError, before anything changes, where a layer has no maximum length.
        """
        for name, cache in self.layers.items():
            if cache.max_length is None:
                raise ArgumentError(
                    f"max_length: expected a number in every layer, got None in {name!r}; "
                    "build its module with max_cache_length"
                )
        for cache in self.layers.values():
            cache.freeze_layout()
        return self

    # --- files ----------------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the conversation into one safetensors file, whole or not at all: beside it, synced, then renamed.

        What is held goes in, with lengths, shapes, windows and position schemes. Weights do not, but digests of those
        that the model has now which it is in, or was taken from, as long as that lives and has not changed since. A
        saved kv_cache that stands there is replaced, and keeps its mode; a link is followed. Raises ArgumentError for
        what is no path, ForeignFileError for any other file, OSError where none can be written, CacheStateError where
        layers have different numbers of rows, and ModuleNotFoundError without the extra `files`.
        """
        files.write(path, self.saved())

    def saved(self) -> files.SavedCache:
        """What `save` writes."""
        caches = {name: slot.cache for name, slot in self._slots.items()}
        layers = {
            name: None if cache is None else (cache.options, snapshot_of(cache.contents))
            for name, cache in caches.items()
        }
        return files.SavedCache(layers, self._origin.weights())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "KVCache":
        """The conversation in a file, on the CPU; `install` puts it into the model, and checks that it fits.

        Raises FileFormatError, naming the file, for anything but a whole and unchanged file of this format and version
        whose options and numbers go with its tensors, ArgumentError for what is no path, and OSError where there is no
        file to be read.
        """
        return cls.of_saved(files.read(path))

    @classmethod
    def of_saved(cls, saved: files.SavedCache) -> "KVCache":
        """The conversation that a file holds; the tensors are its own from now on."""
        layers = saved.layers.items()
        caches = {name: None if layer is None else LayerCache.from_record(*layer) for name, layer in layers}
        slots = {name: CacheSlot(cache) for name, cache in caches.items()}
        return cls._of(slots, origin=Origin(digests=saved.weights))

    # --- its layers -----------------------------------------------------------------------------------------------

    @property
    def layers(self) -> dict[str, LayerCache]:
        """The caches that there are, by module path."""
        return {name: slot.cache for name, slot in self._slots.items() if slot.cache is not None}

    def parts(self) -> Sequence[LayerCache]:
        """The caches that there are."""
        return list(self.layers.values())

    def __repr__(self) -> str:
        return (
            f"KVCache(layers={len(self.layers)}, length={self.length}, held={self.cached_length}, nbytes={self.nbytes})"
        )


def _check_caches(caches: object) -> None:
    if not isinstance(caches, Sequence) or not caches:
        raise ArgumentError(f"caches: expected a list of at least one KVCache, got {caches!r:.200}")
    for cache in caches:
        if not isinstance(cache, KVCache):
            raise ArgumentError(f"caches: expected KVCaches, got {type(cache).__name__}")


def _by_number(slots: Mapping[str, CacheSlot]) -> Sequence[LayerCache]:
    """The layers of a cache that is fed by hand, by number; none where they go by module path."""
    found = [slots.get(str(number)) for number in range(len(slots))]
    caches = [slot.cache for slot in found if slot is not None and slot.cache is not None]
    return caches if len(caches) == len(slots) else ()


def _joined(caches: Sequence[LayerCache | None]) -> LayerCache | None:
    """One layer's rows side by side; None where nothing is there, or sources alone of which some were forgotten."""
    there = [cache for cache in caches if cache is not None]
    kept = [cache for cache in there if any(cache.contents.kinds)]
    projected = [source.kv is not None for cache in kept if (source := cache.contents.source) is not None]
    if 0 < len(kept) < len(caches) and all(cache.contents.state is None for cache in kept) and all(projected):
        return None
    if not kept and len(there) < len(caches):
        return None
    if len(there) < len(caches):
        raise ArgumentError("caches: expected all to have seen tokens, got one that has not")
    return LayerCache.join(there)


def _differences(name: str, cache: LayerCache, expected: LayerCache) -> list[str]:
    """What tells that a cache is not of the module that would begin with `expected`; its size may differ."""
    own, theirs = cache.options, expected.options
    return [
        f"{name!r} has {option}={theirs[option]!r} there and {own[option]!r} here"
        for option in own
        if own[option] != theirs[option] and option != "max_length"
    ]
