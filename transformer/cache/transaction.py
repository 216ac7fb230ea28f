"""Transactions over several steps of a model that a user composed: either all of them are taken, or none is."""

from collections.abc import Iterable
from types import TracebackType

from .contents import CacheContents
from .exchange import Attribute, exchange
from .slot import CacheSlot
from .state import SelfAttentionState


class Transaction:
    """A context that leaves every cache as it was where an exception comes out of it, which then passes.

    It costs no tensor operation: what caches hold is immutable, and what they refer to is not rewritten meanwhile.
    """

    def __init__(self, slots: Iterable[CacheSlot]) -> None:
        self._slots = list(slots)
        self._before: list[Attribute] = []
        self._opened: list[list[int]] = []

    def __enter__(self) -> None:
        self._before, self._opened = [], []
        for slot in self._slots:
            cache = slot.cache
            contents = CacheContents() if cache is None else cache.contents
            if isinstance(contents.state, SelfAttentionState):
                opened = contents.state.storage.open
                opened.append(max(contents.state.slot(contents.state.length)))
                self._opened.append(opened)
            if cache is not None:
                self._before.append((cache, "contents", contents))
            self._before.append((slot, "cache", cache))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                changes = list(self._before)
                for cache, name, contents in self._before:
                    if name == "contents":
                        changes += [change for change in cache.replacing(contents) if change[0] is not cache]
                exchange((), changes)
        finally:
            for opened in self._opened:
                opened.pop()
