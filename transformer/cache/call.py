"""Context of one call: its caches, where the keys and values of each attention module go, and what it has written so
far; and the sequence that ranks share.

A call changes nothing before it is done: it writes into unused slots, and notes what each cache will then hold.
`publish` makes all of it visible at once. So an exception, at any time and in any layer, leaves every cache as it was.
"""

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import ref

import torch

from ..errors import ArgumentError, CacheStateError, ConcurrentUseError
from ..tracing import break_graph, is_compiling
from .cached_layer import CachedLayer
from .contents import CacheContents
from .holder import CacheHolder, CacheSlot
from .known_inputs import NOTHING_KNOWN, Generation, KnownInputs
from .layer import LayerCache
from .lease import Attribute, check_no_recompute, exchange
from .shared_sequence import SharedSequence

T = TypeVar("T")


class CacheCall:
    """The caches that one call of a module, a stack or a model works on.

    Args:
        slots: the slot of each holder that keeps something; None: every holder's own, where it has `use_kv_cache`.
        paths: names of a model's attention modules. Given, self-attention in causal order that has no slot is refused,
            since it would forget the tokens before.
        inputs, generation: what the host knows of the arguments, and the generation of which this is a step.
    """

    __slots__ = ("__weakref__", "_layers", "_paths", "_slots", "done", "generation", "has_begun", "inputs", "reference")

    def __init__(
        self,
        slots: Mapping[CacheHolder, CacheSlot] | None = None,
        paths: Mapping[CacheHolder, str] | None = None,
        inputs: KnownInputs = NOTHING_KNOWN,
        generation: Generation | None = None,
    ) -> None:
        self._slots = slots
        self._paths = paths
        self.inputs = inputs
        self.generation = generation
        self._layers: dict[CacheSlot, CachedLayer] = {}
        self.done = False
        self.has_begun = False  # True once some attention module has asked for its cache.
        self.reference = ref(self)

    @property
    def is_generation(self) -> bool:
        """True if the caller chose the slots, as a generation does, also one without caches."""
        return self._slots is not None

    def slot(self, holder: CacheHolder) -> CacheSlot | None:
        """The slot in which this call keeps the cache of `holder`; None: nowhere."""
        own = holder.slot if holder.use_kv_cache else None
        return own if self._slots is None else self._slots.get(holder)

    def cache(self, holder: CacheHolder) -> LayerCache | None:
        """The cache of a holder as this call has left it so far; a view where the call has written into it."""
        slot = self.slot(holder)
        if slot is None:
            return None
        layer = self._layers.get(slot)
        return slot.cache if layer is None or not layer.changed else layer.cache.holding(layer.contents)

    def contents(self, holder: CacheHolder) -> CacheContents | None:
        """The contents of that cache; None where this call keeps nothing, or nothing was cached yet."""
        slot = holder.slot if self._slots is None and holder.use_kv_cache else self.slot(holder)
        if slot is None:
            return None
        layer = self._layers.get(slot)
        if layer is not None and layer.changed:
            return layer.contents
        return None if slot.cache is None else slot.cache.contents

    def begin(self, holder: CacheHolder) -> CachedLayer | None:
        """A holder's cache as this call has left it so far; None where the call keeps nothing of it.

        Raises ConcurrentUseError where another call works on it, and CacheStateError inside backward.
        """
        slot = holder.slot if self._slots is None and holder.use_kv_cache else self.slot(holder)
        if slot is None:
            return None
        self.has_begun = True
        layer = self._layers.get(slot)
        if layer is None:
            self.mark_in_use(slot)
            cache = holder.new_cache() if slot.cache is None else slot.cache
            layer = self._layers[slot] = CachedLayer(slot, cache, cache.contents, cache.contents)
        return layer

    def mark_in_use(self, slot: CacheSlot) -> None:
        """Marks that this call works on a slot. Raises as `begin`."""
        check_no_recompute()
        other = None if slot.caller is None else slot.caller()
        if other is not None and other is not self and not other.done:
            raise ConcurrentUseError(
                "kv_cache: another call with it is still running, expected one call at a time; "
                "give each thread its own module or cache (copy.deepcopy), or wait for the first call"
            )
        slot.caller = self.reference

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
        expected: list[Attribute] = []
        changes: list[Attribute] = []
        for layer in self._layers.values():
            if layer.contents is not layer.before:
                layer.publish_into(expected, changes)
        if changes:
            exchange(expected, changes)


def active_call() -> CacheCall | None:
    """The call that the caller runs in; None outside of any."""
    if torch.compiler.is_compiling() and is_compiling():
        # A context variable cannot be traced, and is only asked where this thread is inside some call.
        if not _running.calls:
            return None
        break_graph()
    call = _active.get()
    # A context that was copied within a call (an asyncio task, an executor's job) outlives it.
    return None if call is None or call.done else call


def inside_a_call() -> bool:
    """True if this thread is inside some call. It reads no context variable, so that a compiler can guard on it."""
    return bool(_running.calls)


def run_call(call: CacheCall, function: Callable[..., T], *args: Any, **options: Any) -> T:
    """Runs `function` in a context with `call` as the active one, publishes what it wrote, and returns its result."""
    running = _running.calls
    # In one call of C: a reference that dies before it stands in the set could not be discarded.
    running.update(map(ref, (call,), (running.discard,)))
    try:
        # A context of its own vanishes whole, whatever is raised: nothing has to be put back.
        context = contextvars.copy_context()
        context.run(_active.set, call)
        result = context.run(function, *args, **options)
        call.publish()
        return result
    finally:
        call.done = True
        running.discard(call.reference)


def run_uncached(inputs: KnownInputs, function: Callable[..., T], *args: Any) -> T:
    """Runs `function`, which uses no cache, in a context that knows `inputs`. Compilers do not see the call."""
    call, context = CacheCall({}, inputs=inputs), contextvars.copy_context()
    context.run(_active.set, call)
    try:
        return context.run(function, *args)
    finally:
        call.done = True


def active_sequence(modules: Iterable[object]) -> SharedSequence | None:
    """The sequence that calls of any of these modules share here, the innermost of several; None outside of all.

    Raises ArgumentError while being compiled.
    """
    if torch.compiler.is_compiling() and is_compiling():
        if _running.sequences:
            raise ArgumentError("share_sequence: expected a call that is not compiled, got one in torch.compile")
        return None
    shared = _shared.get()
    if not shared:
        return None
    asked = list(modules)
    return next((each for each in shared if any(map(each.covers, asked))), None)


@contextmanager
def sharing(sequence: SharedSequence) -> Iterator[None]:
    """Context in which the calls of the modules that `sequence` covers share their sequence."""
    token = _shared.set((sequence, *_shared.get()))
    _running.sequences += 1
    try:
        yield
    finally:
        _running.sequences -= 1
        _shared.reset(token)


class _Running(threading.local):
    """The calls, and the number of shared sequences, that this thread is inside of: plain enough for a compiler to
    guard on."""

    def __init__(self) -> None:
        self.calls: set[ref[CacheCall]] = set()
        self.sequences = 0


_active: contextvars.ContextVar[CacheCall | None] = contextvars.ContextVar("cache_call", default=None)
_shared: contextvars.ContextVar[tuple[SharedSequence, ...]] = contextvars.ContextVar("shared_sequences", default=())
"""The innermost first."""
_running = _Running()
