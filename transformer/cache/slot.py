"""Slot of a layer's cache, and the one way in which what slots and caches hold is exchanged."""

import os
import threading
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

from ..errors import ConcurrentUseError

if TYPE_CHECKING:
    from .layer import LayerCache


class CacheSlot:
    """Where the cache of one layer is kept: in an attention module, in a conversation outside, or in a generation.

    `cache` is None before the first cached call. `caller` refers weakly to the call that works on it now, if any.
    """

    __slots__ = ("__weakref__", "cache", "caller")

    def __init__(self, cache: "LayerCache | None" = None) -> None:
        self.cache = cache
        self.caller: ref[Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is in no call.
        return CacheSlot, (self.cache,)


class Attribute(NamedTuple):
    """An attribute of an object, and a value: one that it is expected to have, or one that it is to get."""

    holder: Any
    name: str
    value: Any


def exchange(expected: Iterable[Attribute], changes: Iterable[Attribute]) -> None:
    """Gives every attribute its new value, if those that are expected still have theirs.

    The values are set by one loop in C, where Python runs no signal handler and changes no thread: from outside either
    all are set, or none. Raises ConcurrentUseError, with nothing set, where another call has come in between.
    """
    changes = list(changes)
    if not changes:
        return
    objects, names, values = zip(*changes, strict=True)
    with _lock:
        if any(getattr(holder, name) is not value for holder, name, value in expected):
            raise ConcurrentUseError(
                "kv_cache: another call has changed it while this one was running, expected one call at a time; "
                "give each thread its own module or cache (copy.deepcopy), or wait for the first call, and repeat this"
            )
        deque(map(setattr, objects, names, values), maxlen=0)


_lock = threading.Lock()


def _unlock_in_child() -> None:
    global _lock
    _lock = threading.Lock()


_register_at_fork = getattr(os, "register_at_fork", None)  # not on Windows, which has no fork
if _register_at_fork is not None:
    _register_at_fork(after_in_child=_unlock_in_child)
