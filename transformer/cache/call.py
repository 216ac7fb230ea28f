"""Caches of one call: where each attention module's keys and values go, and what the call has written so far.

A call changes nothing before it is done: it writes into dead space of the buffers, and notes what each cache will then
hold. `publish` makes all of it visible at once. So an exception, at any time and in any layer, leaves all as it was.
"""

import contextvars
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor

from ..errors import CacheStateError, ConcurrentUseError
from ..tracing import is_compiling
from .contents import CacheContents
from .exchange import Attribute, exchange
from .holder import CacheHolder, CacheSlot
from .layer import LayerCache
from .state import check_no_recompute

T = TypeVar("T")

IN_ONE_GRAPH = "a cache counts on the host; for one graph turn it off, or freeze_layout() first"
"""Told where a compiler may not break its graph."""


class Written:
    """A layer's cache as one call found it, and what it will hold after the call: `contents`."""

    __slots__ = ("before", "cache", "contents", "slot")

    def __init__(self, slot: CacheSlot, cache: LayerCache) -> None:
        self.slot = slot
        self.cache = cache
        self.before = self.contents = cache.contents

    def expected(self) -> list[Attribute]:
        """What must not have changed since."""
        if self.slot.cache is None:
            return [(self.slot, "cache", None)]
        return [(self.slot, "cache", self.cache), (self.cache, "contents", self.before)]

    def changes(self) -> list[Attribute]:
        """What publishing it sets."""
        changes = self.cache.appending(self.contents)
        if self.slot.cache is not self.cache:
            changes.append((self.slot, "cache", self.cache))
        return changes


class CacheCall:
    """The caches that one call of a module, a stack or a model works on.

    Args:
        slots: the slot of each holder that keeps something; None: every holder's own, where it has `use_kv_cache`.
        paths: names of a model's attention modules. Given, self-attention in causal order that has no slot is refused,
            since it would forget the tokens before.
        tokens: ids that generation itself has taken, which need no look at their range.
        generation: its own for each generation, in which weights are taken to stay as they are.
    """

    __slots__ = ("__weakref__", "_paths", "_slots", "_written", "done", "generation", "reached", "reference", "tokens")

    def __init__(
        self,
        slots: Mapping[CacheHolder, CacheSlot] | None = None,
        paths: Mapping[CacheHolder, str] | None = None,
        tokens: Tensor | None = None,
        generation: object = None,
    ) -> None:
        self._slots = slots
        self._paths = paths
        self.generation = generation
        self._written: dict[CacheSlot, Written] = {}
        self.tokens = tokens
        self.done = False
        self.reached = False
        """Whether some attention module has asked for its cache."""
        self.reference = ref(self)

    def slot(self, holder: CacheHolder) -> CacheSlot | None:
        """Where this call keeps what `holder` remembers; None: nowhere."""
        if self._slots is None:
            return holder.slot if holder.use_kv_cache else None
        return self._slots.get(holder)

    def cache(self, holder: CacheHolder) -> LayerCache | None:
        """The cache of a holder as this call has left it so far; a view where the call has written into it."""
        slot = self.slot(holder)
        if slot is None:
            return None
        written = self._written.get(slot)
        return slot.cache if written is None else written.cache.holding(written.contents)

    def contents(self, holder: CacheHolder) -> CacheContents | None:
        """What a holder's cache holds in this call so far; None where it keeps nothing, or has begun nothing."""
        slot = self.slot(holder)
        if slot is None:
            return None
        written = self._written.get(slot)
        if written is not None:
            return written.contents
        return None if slot.cache is None else slot.cache.contents

    def begin(self, holder: CacheHolder) -> Written | None:
        """What the call has written of a holder's cache, to be gone on from; None where it keeps nothing.

        Raises ConcurrentUseError where another call works on it, and CacheStateError inside backward.
        """
        slot = self.slot(holder)
        if slot is None:
            return None
        self.reached = True
        written = self._written.get(slot)
        if written is not None:
            return written
        self.claim(slot)
        return Written(slot, holder.new_cache() if slot.cache is None else slot.cache)

    def claim(self, slot: CacheSlot) -> None:
        """Says that this call works on a slot. Raises as `begin`."""
        check_no_recompute()
        other = None if slot.caller is None else slot.caller()
        if other is not None and other is not self and not other.done:
            raise ConcurrentUseError(
                "kv_cache: another call with it is still running, expected one call at a time; "
                "give each thread its own module or cache (copy.deepcopy), or wait for the first call"
            )
        slot.caller = self.reference

    def write(self, written: Written, contents: CacheContents) -> None:
        """Notes what a cache will hold."""
        written.contents = contents
        self._written[written.slot] = written

    def check_forgets_nothing(self, holder: CacheHolder) -> None:
        """Raises CacheStateError where self-attention without a slot runs in a cached generation."""
        if self._paths is None or self.slot(holder) is not None:
            return
        path = self._paths.get(holder)
        place = f"{type(holder).__name__}, which is no registered module of the model" if path is None else path
        raise CacheStateError(
            f"{place}: expected a cache, as other attention of the model has one, got causal attention that keeps "
            "nothing and would forget the tokens before; set use_kv_cache=True, or give use_cache=False"
        )

    def publish(self) -> None:
        """Makes what was written visible, all of it at once. Raises ConcurrentUseError, and then none of it is."""
        if self._written:
            written = self._written.values()
            exchange([a for each in written for a in each.expected()], [a for each in written for a in each.changes()])


def active_call() -> CacheCall | None:
    """The call that this one is part of, in this thread; None where it stands alone."""
    if is_compiling():
        # A context variable cannot be traced, and is only asked where this thread is inside some call.
        if not _hint.running:
            return None
        torch._dynamo.graph_break(msg=IN_ONE_GRAPH)
    call = _active.get()
    # A context that was copied within a call (an asyncio task, an executor's job) outlives it.
    return None if call is None or call.done else call


def inside_a_call() -> bool:
    """Whether this thread is inside some call: told without its context, so that a compiler can guard on it."""
    return bool(_hint.running)


def run_call(call: CacheCall, function: Callable[..., T], *args: Any, **options: Any) -> T:
    """What `function` returns, run in a context in which `call` is the active one; then what it wrote is published."""
    running = _hint.running
    # In one call of C: a reference that dies before it stands in the set could not be discarded.
    running.update(map(ref, (call,), (running.discard,)))
    try:
        # A context of its own vanishes whole, whatever is raised: nothing has to be put back.
        result = contextvars.copy_context().run(_within, call, function, args, options)
        call.publish()
        return result
    finally:
        call.done = True
        running.discard(call.reference)


def run_eagerly(function: Callable[..., T], *args: Any) -> T:
    """What `function` returns, run outside of what is being compiled.

    A cache counts in Python integers, for each of which the compiler would compile anew.
    """
    torch._dynamo.graph_break(msg=IN_ONE_GRAPH)
    return torch.compiler.disable(function)(*args)  # type: ignore[no-any-return,no-untyped-call]


def _within(call: CacheCall, function: Callable[..., T], args: tuple[Any, ...], options: dict[str, Any]) -> T:
    _active.set(call)
    return function(*args, **options)


class _Hint(threading.local):
    """The calls that this thread is inside of: plain enough for a compiler to guard on."""

    def __init__(self) -> None:
        self.running: set[ref[CacheCall]] = set()


_active: contextvars.ContextVar[CacheCall | None] = contextvars.ContextVar("cache_call", default=None)
_hint = _Hint()
