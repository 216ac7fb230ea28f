"""Installation of a conversation in a model, and its removal: which cache each attention module has."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn
from typing_extensions import Self

from ..errors import ArgumentError, CacheStateError
from .call import active_call
from .holder import CacheHolder, CacheSlot, holders
from .layer import LayerCache
from .lease import exchange
from .origin import Origin
from .spec import CacheSpec
from .standalone import Expected, StandaloneCache


class InstallableCache(StandaloneCache):
    """A conversation by the slots of its layers: those of the modules of a model, or slots of its own."""

    @classmethod
    def _of(
        cls, slots: Mapping[str, CacheSlot], expected: Expected | None = None, origin: Origin | None = None
    ) -> Self:
        cache = cls.__new__(cls)
        cache._begin(slots, expected or Expected(), origin or Origin())
        return cache

    def _begin(self, slots: Mapping[str, CacheSlot], expected: Expected, origin: Origin) -> None:
        self._expected = expected
        self._origin = origin
        self._slots = dict(slots)
        self._holders: dict[str, CacheHolder] = {}
        # The model, as long as this is its live view: its weights can then be compared.
        self._model: nn.Module | None = None
        self._numbered = _by_number(slots)

    @classmethod
    def from_model(cls, model: nn.Module) -> Self:
        """The live view of every cache in a model. Raises ArgumentError for a model without attention.

        Within a generation, such as in a forward hook, it shows that generation's caches.
        """
        found, call = holders(model), active_call()
        slots = {name: holder.slot if call is None else call.slot(holder) for name, holder in found.items()}
        view = cls._of({name: slot or CacheSlot() for name, slot in slots.items()}, origin=Origin.of(model))
        view._holders, view._model, view._numbered = found, model, ()
        return view

    @classmethod
    def of_slots(cls, slots: Mapping[str, CacheSlot]) -> Self:
        """The conversation in these slots, by module path."""
        return cls._of(slots)

    def remove(self, model: nn.Module) -> Self:
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

    def install(self, model: nn.Module, *, check_weights: bool = False) -> Self:
        """Puts the conversation into a model, and becomes the live view of it.

        Layers, shapes, position schemes and windows are always compared. `check_weights=True` compares the weights too:
        with those of the model that the conversation comes from, while that lives and has not changed since the
        conversation was taken out or forked, or with the digests that its file has of them. It reads every weight once
        (135 million float32 in 0.4 s of one core), except of the very model that the conversation was taken from, of
        which versions and addresses are compared. A model that was cast has other weights. Without the check, the
        conversation counts as one of this model from then on.

        Raises CacheStateError where the model has a conversation or its caches are off, and ArgumentError, naming the
        differences, where it is not like the model that made this conversation, or that one's weights are not known.
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
            differences += _differences(name, caches[name].spec, found[name].cache_spec)
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
    def installed(self, model: nn.Module) -> Iterator[Self]:
        """A context in which the conversation is in `model`; after it, also after an exception, it is out again.

        Raises as `install` does.
        """
        try:
            yield self.install(model)
        finally:
            if self._is_in(holders(model)):
                self.remove(model)

    def _is_in(self, found: Mapping[str, CacheHolder]) -> bool:
        return bool(self._holders) and self._slots == {name: holder.slot for name, holder in found.items()}

    def reserve(self, tokens: int) -> Self:
        """Makes room for so many tokens more in every layer, also in those whose first token is still to come.

        Raises as that of one layer does; no layer has changed then.
        """
        empty = [h for h in self._holders.values() if h.use_kv_cache and h.slot.cache is None]
        begun = [(holder.slot, "cache", holder.new_cache().reserve(tokens)) for holder in empty]
        super().reserve(tokens)
        exchange([(holder.slot, "cache", None) for holder in empty], begun)
        return self

    @property
    def layers(self) -> dict[str, LayerCache]:
        """The caches that there are, by module path."""
        return {name: slot.cache for name, slot in self._slots.items() if slot.cache is not None}

    def parts(self) -> Sequence[LayerCache]:
        """The caches that there are."""
        return list(self.layers.values())


def _by_number(slots: Mapping[str, CacheSlot]) -> Sequence[LayerCache]:
    """The layers of a standalone cache, by number; none where they have module paths."""
    found = [slots.get(str(number)) for number in range(len(slots))]
    caches = [slot.cache for slot in found if slot is not None and slot.cache is not None]
    return caches if len(caches) == len(slots) else ()


def _differences(name: str, own: CacheSpec, theirs: CacheSpec) -> list[str]:
    differing = own.differences(theirs).items()
    return [f"{name!r} has {field}={there!r} there and {here!r} here" for field, (here, there) in differing]
