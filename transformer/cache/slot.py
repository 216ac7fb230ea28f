"""Slot of a layer's cache."""

from typing import Any
from weakref import ref

from .layer import LayerCache


class CacheSlot:
    """The place of one layer's cache: in an attention module, in a conversation outside, or in a generation.

    `cache` is None before the first cached call. `caller` refers weakly to the call that works on it now, if any.
    """

    __slots__ = ("__weakref__", "cache", "caller")

    def __init__(self, cache: LayerCache | None = None) -> None:
        self.cache = cache
        self.caller: ref[Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is in no call.
        return CacheSlot, (self.cache,)
