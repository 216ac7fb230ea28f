"""The caches of a whole model as one conversation."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import ArgumentError, CacheStateError
from . import files
from .guard import Guard
from .layer import LayerCache
from .manual import Expected, FedByHand, new_layers
from .owner import CacheOwner, owners
from .record import recorded
from .transaction import transaction

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(slots=True)
class Place:
    """Where a layer's cache is while no module owns it."""

    kv_cache: LayerCache | None


class KVCache(FedByHand):
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
        expected = Expected.of(dtype, device)
        self._begin({str(number): Place(cache) for number, cache in enumerate(layers)}, expected)

    @classmethod
    def _of(cls, places: Mapping[str, Place | CacheOwner], expected: Expected | None = None) -> "KVCache":
        cache = cls.__new__(cls)
        cache._begin(places, expected or Expected())
        return cache

    def _begin(self, places: Mapping[str, Place | CacheOwner], expected: Expected) -> None:
        self._expected = expected
        self._guard = Guard()
        self._move_to(places)

    def _move_to(self, places: Mapping[str, Place | CacheOwner]) -> None:
        self._places = dict(places)
        found = (self._places.get(str(number)) for number in range(len(places)))
        caches = [place.kv_cache for place in found if isinstance(place, Place)]
        numbered = [cache for cache in caches if cache is not None]
        self._numbered = numbered if len(numbered) == len(places) else []

    # --- a model's conversations ----------------------------------------------------------------------------------

    @classmethod
    def from_model(cls, model: nn.Module) -> "KVCache":
        """The live view of every cache in a model. Raises ArgumentError for a model without attention."""
        return cls._of(owners(model))

    def remove(self, model: nn.Module) -> "KVCache":
        """Takes the conversation out of its model, which is then empty, and returns it.

        Raises CacheStateError where it is not in this model.
        """
        found = owners(model)
        if found != self._places:
            raise CacheStateError("model: expected the one that this conversation is in; it is not, or not any more")
        self._move_to({name: Place(owner.kv_cache) for name, owner in found.items()})
        for owner in found.values():
            owner.kv_cache = None
        return self

    def install(self, model: nn.Module) -> "KVCache":
        """Puts the conversation into a model, and becomes the live view of it.

        Raises CacheStateError where the model holds a conversation, and ArgumentError, naming every difference, where
        it has other layers, shapes, position schemes or windows than the one that this conversation comes from.
        """
        found = owners(model)
        if found == self._places:
            return self
        if any(isinstance(place, CacheOwner) for place in self._places.values()):
            raise CacheStateError("install: this conversation is in another model; remove() it there first")
        caches = self.layers
        differences = [f"{name!r} is not in the model" for name in self._places if name not in found]
        differences += [f"{name!r} is not in the conversation" for name in found if name not in self._places]
        for name in caches.keys() & found.keys():
            differences += _differences(name, caches[name], found[name].new_cache())
        if differences:
            raise ArgumentError(
                f"model: expected the one that this conversation was had with, but {'; '.join(differences)}"
            )
        if any(owner.kv_cache is not None for owner in found.values()):
            raise CacheStateError(
                "model: expected one without a conversation; KVCache.from_model(model).remove(model) it"
            )
        for name, cache in caches.items():
            found[name].kv_cache = cache
        self._move_to(found)
        return self

    def fork(self) -> "KVCache":
        """A second conversation that begins with all that this one has seen. It costs nothing until one side writes."""
        caches = {name: place.kv_cache for name, place in self._places.items()}
        forks = {name: Place(None if cache is None else cache.fork()) for name, cache in caches.items()}
        return self._of(forks, self._expected)

    @classmethod
    def join(cls, caches: "Sequence[KVCache]") -> "KVCache":
        """The rows of conversations of different lengths in one running batch; they themselves stay as they are.

        A source of cross-attention that one of them has not kept is projected anew. Raises ArgumentError, DtypeError or
        DeviceError where they cannot stand in one batch.
        """
        if not caches:
            raise ArgumentError("caches: expected at least one, got none")
        names = caches[0]._places.keys()
        for cache in caches:
            if cache._places.keys() != names:
                differing = sorted(cache._places.keys() ^ names)
                raise ArgumentError(
                    f"caches: expected all to be of the model of the first, got one that differs in {differing}"
                )
            if cache.batch is None:
                raise ArgumentError("caches: expected all to have seen tokens, got one that has not")
        joint = {name: Place(_joined([cache._places[name].kv_cache for cache in caches])) for name in names}
        return cls._of(joint, caches[0]._expected)

    def reserve(self, tokens: int) -> "Self":
        """Makes room for so many tokens more in every layer, also in those whose first token is still to come.

        Raises as that of one layer does; no layer has changed then.
        """
        places = self._places.values()
        owners = [place for place in places if isinstance(place, CacheOwner) and place.use_kv_cache]
        begun = [(owner, owner.new_cache().reserve(tokens)) for owner in owners if owner.kv_cache is None]
        super().reserve(tokens)
        for owner, cache in begun:
            owner.kv_cache = cache
        return self

    def transaction(self) -> AbstractContextManager[None]:
        """A context in which an exception leaves every cache as it was before: for models that are composed by hand."""
        return transaction(self._places.values())

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

        What is held goes in, with lengths, shapes, windows and position schemes; weights do not. Raises
        ModuleNotFoundError without the extra `files`.
        """
        caches = {name: place.kv_cache for name, place in self._places.items()}
        recordings = {
            name: None if cache is None else (cache.options, recorded(cache.contents)) for name, cache in caches.items()
        }
        files.write(path, recordings)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "KVCache":
        """The conversation in a file, on the CPU; `install` puts it into the model, and checks that it fits.

        Raises FileFormatError, naming the file, for anything but a whole and unchanged file of this format and version,
        and OSError where there is no file to be read.
        """
        layers = files.read(path).items()
        caches = {name: None if layer is None else LayerCache.from_record(*layer) for name, layer in layers}
        return cls._of({name: Place(cache) for name, cache in caches.items()})

    # --- its layers -----------------------------------------------------------------------------------------------

    @property
    def layers(self) -> dict[str, LayerCache]:
        """The caches that there are, by module path."""
        return {name: place.kv_cache for name, place in self._places.items() if place.kv_cache is not None}

    def parts(self) -> Sequence[LayerCache]:
        """The caches that there are."""
        return list(self.layers.values())

    def __repr__(self) -> str:
        return f"KVCache(layers={len(self.layers)}, length={self.length}, held={self.held}, nbytes={self.nbytes})"


def _joined(caches: Sequence[LayerCache | None]) -> LayerCache | None:
    """One layer's rows side by side; None where nothing is there, or sources alone of which some were forgotten."""
    there = [cache for cache in caches if cache is not None]
    kept = [cache for cache in there if any(part is not None for part in cache.contents)]
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
