"""Caches of one generation: the model's own conversation, a separate conversation, or no caches.

A generation writes into its own cache slots, which its calls find by the active call (`cache/call.py`), and not into
the model's modules. A continued conversation of the model is published at the end, in one exchange.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from ..cache import (
    Attribute,
    CacheCall,
    CacheContents,
    CacheHolder,
    CacheSlot,
    Generation,
    KnownInputs,
    KnownMask,
    KVCache,
    LayerCache,
    Lengths,
    exchange,
    run_call,
    run_uncached,
)
from ..deprecation import warn_old
from ..errors import CacheStateError

T = TypeVar("T")


class Origin(NamedTuple):
    """A layer of the model's own conversation: its holder, the cache in its slot, and the contents of that cache."""

    holder: CacheHolder
    cache: LayerCache | None
    contents: CacheContents

    @classmethod
    def of(cls, holder: CacheHolder) -> "Origin":
        """The current state of a holder."""
        cache = holder.slot.cache
        return cls(holder, cache, CacheContents() if cache is None else cache.contents)

    def expected(self) -> list[Attribute]:
        """The attributes that must not change until the conversation is published."""
        slot = [(self.holder.slot, "cache", self.cache)]
        return slot if self.cache is None else [*slot, (self.cache, "contents", self.contents)]

    def changed(self) -> bool:
        """True if other code has changed the layer."""
        same = all(getattr(holder, name) is value for holder, name, value in self.expected())
        return not (same and self.holder.use_kv_cache)


class Session:
    """The cache slots of one generation.

    Args:
        found: all cache holders of the model, by path.
        slots: the slot of each holder that has a cache in this generation; None if no holder uses a cache.
        origins: the layers of the model's own conversation, if this generation continues or replaces it; else None.
        begins: True if the generation replaces the model's own conversation.
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
        self.shown: Sequence[int] | None = None
        """Lengths of the rows to which the model's own conversation is published; None: all that was read."""
        self.generation = Generation()
        caching = {path: slots[holder] for path, holder in found.items() if holder in slots} if slots else {}
        self.cache = KVCache.of_slots(caching) if caching else None
        self._paths = {holder: path for path, holder in found.items()} if caching else None

    @classmethod
    def live(cls, found: Mapping[str, CacheHolder], *, begins: bool = False) -> "Session":
        """A session that continues the conversation in these modules, or replaces it with `begins=True`."""
        origins = [Origin.of(holder) for holder in found.values() if holder.use_kv_cache]
        slots = {}
        for holder, cache, contents in origins:
            slots[holder] = CacheSlot(None if begins or cache is None else cache.holding(contents))
        return cls(found, slots, origins, begins)

    @classmethod
    def separate(cls, found: Mapping[str, CacheHolder]) -> "Session":
        """A session with a separate conversation, which ends with it."""
        return cls(found, {holder: CacheSlot() for holder in found.values()})

    def separated(self, caches: Mapping[str, LayerCache] | None = None) -> "Session":
        """A separate session in the same modules, with these caches by path, or with a conversation that begins."""
        paths = {path: holder for path, holder in self._found.items() if self._slots and holder in self._slots}
        return Session(self._found, {holder: CacheSlot((caches or {}).get(path)) for path, holder in paths.items()})

    @classmethod
    def aside(cls, found: Mapping[str, CacheHolder]) -> "Session":
        """Deprecated name of `separate`."""
        warn_old("Session.aside", "Session.separate")
        return cls.separate(found)

    @classmethod
    def without_caches(cls, found: Mapping[str, CacheHolder]) -> "Session":
        """A session without caches: modules with `use_kv_cache=True` do not use their caches in its calls."""
        return cls(found, {} if any(holder.use_kv_cache for holder in found.values()) else None)

    @property
    def continues_conversation(self) -> bool:
        """True if the model's own conversation contains the tokens of this session when it ends."""
        return self._origins is not None

    @property
    def keeps(self) -> bool:
        """Deprecated name of `continues_conversation`."""
        warn_old("Session.keeps", "Session.continues_conversation")
        return self.continues_conversation

    def cache_of(self, holder: CacheHolder) -> LayerCache | None:
        """The cache of a module in this session; None if it is empty."""
        slot = None if self._slots is None else self._slots.get(holder)
        return None if slot is None else slot.cache

    @property
    def compresses(self) -> bool:
        """True if a cache is compressed after each call (`cache_budget`)."""
        return any(holder.budget is not None for holder in self._slots or ())

    @property
    def shortest_window(self) -> int | None:
        """Tokens of the shortest window of a cache; None: none has one."""
        specs = [holder.cache_spec for holder in self._slots or ()]
        return min((spec.window_size for spec in specs if spec.window_size is not None), default=None)

    def reserve(self, tokens: int) -> None:
        """Makes room for so many tokens in caches that grow with every token, at once or with their first tokens.

        A cache that has more tokens than these grows by doubling, as in calls of the model, so that a long conversation
        is not copied in each turn.
        """
        for holder, slot in (self._slots or {}).items():
            spec = holder.cache_spec if slot.cache is None else slot.cache.spec
            if spec.max_length is not None or spec.window_size is not None or holder.budget is not None:
                continue
            if slot.cache is None:
                slot.cache = holder.new_cache().reserve(tokens)
            elif slot.cache.cached_length < tokens:
                slot.cache.reserve(tokens)

    def make_room(self, tokens: int) -> None:
        """Makes room in the caches of windows for a call of so many tokens, in one layer after the other."""
        for holder, slot in (self._slots or {}).items():
            if slot.cache is not None and holder.budget is None:
                slot.cache.make_room(tokens)

    def read(
        self, function: Callable[[Tensor, Tensor | None], T], tokens: Tensor, mask: KnownMask | None, known: bool
    ) -> T:
        """Calls `function(tokens, mask)` with the caches of this session. `known`: the ids are in the vocabulary."""
        inputs, real = KnownInputs(tokens if known else None, mask), None if mask is None else mask.mask
        if self._slots is None:
            return run_uncached(inputs, function, tokens, real)
        call = CacheCall(self._slots, self._paths, inputs, self.generation)
        result = run_call(call, function, tokens, real)
        if self._paths is not None and not call.has_begun:
            raise CacheStateError(
                "use_cache: expected the model's attention to run in this thread and context, where the caches are, "
                "got a forward that reached none of the caches and would lose the earlier tokens; run it in this "
                "thread, run it elsewhere in a contextvars.copy_context() if it is not compiled, or give "
                "use_cache=False"
            )
        return result

    def fork(self) -> "Session":
        """A separate session that begins with a fork of these caches."""
        if self._origins is None or self._slots is None:
            return self
        caches = {holder: slot.cache for holder, slot in self._slots.items()}
        forks = {holder: CacheSlot(None if cache is None else cache.fork()) for holder, cache in caches.items()}
        return Session(self._found, forks)

    def run(self, work: Callable[[], T]) -> T:
        """Calls `work()`, which reads in this session, then publishes the model's own conversation.

        Other calls of that conversation are refused meanwhile. Raises CacheStateError if it has changed since this
        session last read it.
        """
        if self._origins is None:
            return work()
        if any(origin.changed() for origin in self._origins):
            raise CacheStateError(
                "stream: the conversation in the model has changed since the last token, so this stream ends; restore "
                "it before the next token (KVCache.install), or, if several streams alternate, give each its own "
                "conversation (disable_cache)"
            )
        call = CacheCall()
        try:
            for origin in self._origins:
                call.mark_in_use(origin.holder.slot)
            result = work()
            self._publish(self._origins)
            return result
        except BaseException:
            self._return_leases(self._origins)
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
            if own is None:
                changes.append((holder.slot, "cache", None))
                continue
            contents = own.contents if self.shown is None else own.contents.truncated(Lengths.of(self.shown))
            if cache is not None and not self._begins:
                changes.append((cache, "contents", contents))
            else:
                changes.append((holder.slot, "cache", own.holding(contents)))
        exchange(expected, changes)
        self._origins, self._begins = [Origin.of(holder) for holder, _, _ in origins], False

    def _return_leases(self, origins: list[Origin]) -> None:
        """Lets the model's conversation append in place again: the tokens of this session after it are discarded."""
        for holder, _, contents in origins:
            own = None if self._slots is None else self._slots[holder].cache
            if own is not None:
                own.put(contents)
