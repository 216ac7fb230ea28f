"""The caches of one generation: the model's own conversation, one beside it, or none."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..cache import CacheOwner, KVCache, LayerCache
from ..errors import CacheStateError


@dataclass(slots=True)
class Session:
    """What the model's attention modules remember while they read for one generation.

    Except for a live conversation nothing of it stays in the model between two reads, so that several generations may
    take turns on one model.
    """

    cache: KVCache | None
    """The live view of the conversation; None without caches."""
    keep: bool
    """Whether it is the model's own, which goes on after this generation."""
    _owners: Sequence[CacheOwner]
    _aside: list[LayerCache | None] = field(default_factory=list)
    _left: list[object] | None = None
    """What the model's own conversation was when it was last read; None before that."""

    @classmethod
    def live(cls, cache: KVCache, owners: Sequence[CacheOwner]) -> "Session":
        """The conversation that is in the model, in these modules."""
        return cls(cache, True, owners)

    @classmethod
    def aside(
        cls, cache: KVCache, owners: Sequence[CacheOwner], layers: Sequence[LayerCache] | None = None
    ) -> "Session":
        """A conversation of its own, in these modules only while they read: a new one, or the one in `layers`."""
        return cls(cache, False, owners, [None] * len(owners) if layers is None else list(layers))

    @classmethod
    def without_caches(cls, owners: Sequence[CacheOwner]) -> "Session":
        """These modules, which remember otherwise, do not while they read."""
        return cls(None, False, owners, [None] * len(owners))

    def fork(self) -> "Session":
        """One that begins with all that this one has seen, and leaves it alone."""
        if not self.keep:
            return self
        forks = [None if owner.kv_cache is None else owner.kv_cache.fork() for owner in self._owners]
        return Session(self.cache, False, self._owners, forks)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Puts the conversation into the model for the time of one or more reads, and what was there back after it.

        Raises CacheStateError where the model's own has changed since it was last read here.
        """
        if self.keep:
            if self._left is not None and any(a is not b for a, b in zip(self._left, self._states(), strict=True)):
                raise CacheStateError(
                    "stream: the conversation in the model has changed since the last token; put it back with "
                    "KVCache.install, or stream on one of its own (disable_cache) where several take turns"
                )
            yield
            self._left = self._states()
            return
        before = [(owner.use_kv_cache, owner.kv_cache) for owner in self._owners]
        for owner, cache in zip(self._owners, self._aside, strict=True):
            owner.use_kv_cache, owner.kv_cache = self.cache is not None, cache
        try:
            yield
        finally:
            self._aside = [owner.kv_cache for owner in self._owners]
            for owner, (use_kv_cache, kv_cache) in zip(self._owners, before, strict=True):
                owner.use_kv_cache, owner.kv_cache = use_kv_cache, kv_cache

    def _states(self) -> list[object]:
        """What each module goes on from, told apart by identity: what holds tokens is never changed in place."""
        caches = [owner.kv_cache if owner.use_kv_cache else None for owner in self._owners]
        return [None if cache is None else cache.contents.state for cache in caches]
