"""The caches of one generation: the model's own conversation, one beside it, or none.

A generation works on slots of its own, which its calls find through the call (`cache/call.py`): nothing of it stands in
the model's modules. What it has made of the model's own conversation is published at the end, all of it at once.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from torch import Tensor

from ..cache import Attribute, CacheCall, CacheContents, CacheHolder, CacheSlot, KVCache, LayerCache, exchange, run_call
from ..errors import CacheStateError

T = TypeVar("T")


class Origin(NamedTuple):
    """Where a layer of the model's own conversation comes from: its slot, and what that and its cache held."""

    holder: CacheHolder
    cache: LayerCache | None
    contents: CacheContents

    @classmethod
    def of(cls, holder: CacheHolder) -> "Origin":
        """As it is now."""
        cache = holder.slot.cache
        return cls(holder, cache, CacheContents() if cache is None else cache.contents)

    def expected(self) -> list[Attribute]:
        """What must not have changed since."""
        slot = [(self.holder.slot, "cache", self.cache)]
        return slot if self.cache is None else [*slot, (self.cache, "contents", self.contents)]

    def changed(self) -> bool:
        """Whether somebody else has changed it since."""
        same = all(getattr(holder, name) is value for holder, name, value in self.expected())
        return not (same and self.holder.use_kv_cache)


class Session:
    """What a generation remembers while it runs, in slots of its own.

    Args:
        found: the attention modules that remember, by path; those of the whole model where it has more.
        slots: where they keep it; None: no caches, and none to keep out of the way.
        origins: the model's own conversation, which this generation goes on with; None where it has one of its own.
    """

    def __init__(
        self,
        found: Mapping[str, CacheHolder],
        slots: Mapping[CacheHolder, CacheSlot] | None,
        origins: list[Origin] | None = None,
        begins: bool = False,
    ) -> None:
        self._found = found
        self._slots = slots
        self._origins = origins
        self._begins = begins
        self._identity = object()
        caching = {path: slots[holder] for path, holder in found.items() if holder in slots} if slots else {}
        self.cache = KVCache.of_slots(caching) if caching else None
        self._paths = {holder: path for path, holder in found.items()} if caching else None

    @classmethod
    def live(cls, found: Mapping[str, CacheHolder], *, begins: bool = False) -> "Session":
        """One that goes on with the conversation in these modules; `begins`: one that takes its place."""
        origins = [Origin.of(holder) for holder in found.values() if holder.use_kv_cache]
        slots = {}
        for holder, cache, contents in origins:
            slots[holder] = CacheSlot(None if begins or cache is None else cache.holding(contents))
        return cls(found, slots, origins, begins)

    @classmethod
    def aside(cls, found: Mapping[str, CacheHolder]) -> "Session":
        """One with a conversation of its own."""
        return cls(found, {holder: CacheSlot() for holder in found.values()})

    @classmethod
    def without_caches(cls, found: Mapping[str, CacheHolder]) -> "Session":
        """One without: modules that remember otherwise do not while they read for it."""
        return cls(found, {} if any(holder.use_kv_cache for holder in found.values()) else None)

    @property
    def keeps(self) -> bool:
        """Whether it goes on with the model's own conversation."""
        return self._origins is not None

    def cache_of(self, holder: CacheHolder) -> LayerCache | None:
        """What a module has read so far in this session; None for nothing."""
        slot = None if self._slots is None else self._slots.get(holder)
        return None if slot is None else slot.cache

    def read(
        self, function: Callable[[Tensor, Tensor | None], T], tokens: Tensor, real: Tensor | None, known: bool
    ) -> T:
        """What a model's function returns for `tokens`, read in this session; `known`: they are in the vocabulary."""
        if self._slots is None:
            return function(tokens, real)
        call = CacheCall(self._slots, self._paths, tokens if known else None, self._identity)
        result = run_call(call, function, tokens, real)
        if self._paths is not None and not call.reached:
            raise CacheStateError(
                "use_cache: expected the model's attention to run in this thread and context, where the caches are, "
                "got a forward that reached none of them and would forget the tokens before; run it here "
                "(contextvars.copy_context carries over to another thread what is not compiled), or give "
                "use_cache=False"
            )
        return result

    def fork(self) -> "Session":
        """One that begins with all that this one has seen, and leaves it alone."""
        if self._origins is None or self._slots is None:
            return self
        caches = {holder: slot.cache for holder, slot in self._slots.items()}
        forks = {holder: CacheSlot(None if cache is None else cache.fork()) for holder, cache in caches.items()}
        return Session(self._found, forks)

    def run(self, work: Callable[[], T]) -> T:
        """What `work` returns, which reads in this session; what the model's own conversation has become is then
        published. Meanwhile other calls of it are refused.

        Raises CacheStateError where it has changed since it was last read here.
        """
        if self._origins is None:
            return work()
        if any(origin.changed() for origin in self._origins):
            raise CacheStateError(
                "stream: the conversation in the model has changed since the last token, so this stream ends; another "
                "time put it back before the next token (KVCache.install), or stream on one of its own "
                "(disable_cache) where several take turns"
            )
        call = CacheCall()
        try:
            for origin in self._origins:
                call.claim(origin.holder.slot)
            result = work()
            self._publish(self._origins)
            return result
        except BaseException:
            self._give_leases_back(self._origins)
            raise
        finally:
            call.done = True

    def _publish(self, origins: list[Origin]) -> None:
        changes: list[Attribute] = []
        expected: list[Attribute] = []
        for origin in origins:
            holder, cache, _ = origin
            own = None if self._slots is None else self._slots[holder].cache
            if own is None and not self._begins:
                continue
            expected += origin.expected()
            if own is not None and cache is not None and not self._begins:
                changes.append((cache, "contents", own.contents))
            else:
                fresh = None if own is None else own.holding(own.contents)
                changes.append((holder.slot, "cache", fresh))
        exchange(expected, changes)
        self._origins, self._begins = [Origin.of(holder) for holder, _, _ in origins], False

    def _give_leases_back(self, origins: list[Origin]) -> None:
        """Lets the conversation go on in place: what this session had written after it is read by nobody any more."""
        for holder, _, contents in origins:
            own = None if self._slots is None else self._slots[holder].cache
            if own is not None:
                own.put(contents)
