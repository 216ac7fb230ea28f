"""Transaction over several steps of a model that a user composed: either all of them count, or none does."""

from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType

from .contents import CacheContents
from .holder import CacheSlot
from .layer import LayerCache
from .lease import Attribute, exchange
from .state import SelfAttentionState


class Transaction:
    """A context in which an exception, which then passes, leaves every cache as it was.

    It costs no tensor operation: the contents of caches are immutable, and their slots are not rewritten meanwhile.
    """

    def __init__(self, slots: Iterable[CacheSlot]) -> None:
        self._slots = list(slots)
        self._slots_before: list[Attribute] = []
        self._before: list[tuple[LayerCache, CacheContents]] = []
        self._shares = ExitStack()

    def __enter__(self) -> None:
        self._slots_before, self._before, self._shares = [], [], ExitStack()
        for slot in self._slots:
            cache = slot.cache
            contents = CacheContents() if cache is None else cache.contents
            state = contents.state
            if isinstance(state, SelfAttentionState) and state.buffers.lease is not None:
                state.buffers.lease.share(max(state.slot(state.length)), until=self._shares)
            if cache is not None:
                self._before.append((cache, contents))
            self._slots_before.append((slot, "cache", cache))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                undone = [change for cache, contents in self._before for change in cache.changes_to(contents)]
                exchange((), [*self._slots_before, *undone])
        finally:
            self._slots_before, self._before = [], []
            self._shares.close()
