"""Lease of buffers, the right to append to them in place, and exchange, the one way to publish what a call wrote."""

from collections import deque
from collections.abc import Iterable
from functools import partial
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from ..errors import ConcurrentUseError

Attribute = tuple[Any, str, Any]
"""An object, the name of an attribute, and its value: the expected one, or the new one."""


def exchange(expected: Iterable[Attribute], changes: Iterable[Attribute]) -> None:
    """Gives every attribute its new value, if those that are expected still have theirs.

    All of it is one pass in C over lazy iterators, in which Python runs no signal handler and changes no thread: from
    outside either everything has been exchanged, or nothing, and no lock is needed that could stay taken.
    Raises ConcurrentUseError, with nothing changed, where another call has come in between.
    """
    kept, changes = list(expected), list(changes)
    # Freed at the end: a finaliser is foreign code, and would run in between.
    replaced = list(map(getattr, _holders(changes), _names(changes)))
    unchanged = map(is_, map(getattr, _holders(kept), _names(kept)), _values(kept))
    checked = map({True: None}.__getitem__, unchanged)
    try:
        deque(chain(checked, map(setattr, _holders(changes), _names(changes), _values(changes))), maxlen=0)
    except KeyError:
        raise ConcurrentUseError(
            "kv_cache: another call has changed it while this one was running, expected one call at a time; "
            "give each thread its own module or cache (copy.deepcopy), or wait for the first call, and repeat this"
        ) from None
    del replaced


_holders, _names, _values = (partial(map, itemgetter(position)) for position in range(3))


class Lease:
    """Copy-on-write of buffers: the right of one state to append in place. A state is identified by its version.

    `acquire` takes the right, for a write; `renew` gives it to the state that the write, or a truncation, has made;
    `share` says that a second state reads the buffers from now on, which never acquires.

    (It keeps versions, not states: a cycle would keep buffers alive until the next garbage collection.)
    """

    __slots__ = ("_open", "_shared", "clean", "versions")

    def __init__(self, version: object = None, *, clean: bool = True) -> None:
        self.versions = [] if version is None else [version]
        """The version of the state that may append; none while a write is under way, and after a failed one."""
        self.clean = clean
        """Whether slots beyond that state's tokens are zero, as rows of different lengths need: theirs are read, with
        weight 0."""
        self._shared = 0
        self._open: list[int] = []

    def is_held_by(self, version: object) -> bool:
        """Whether the state of this version may append in place."""
        return version in self.versions

    def acquire(self, version: object) -> bool:
        """Takes the right, if it is this state's; of several threads one gets it."""
        versions = self.versions
        try:
            return version in versions and versions.pop() is version
        except IndexError:
            return False

    def renew(self, version: object, truncated: object = None, end: int = 0) -> list[Attribute]:
        """The changes that give the right to the next state.

        A write made that state; or a truncation to slot `end` did, if `truncated` is the version of the state before.
        It may then append in place only if the state before might, and if no other state reads the slots to be written.
        """
        if truncated is None:
            return [(self, "versions", [version])]
        if truncated not in self.versions or end < max(self._shared, *self._open, 0):
            return []
        return [(self, "versions", [version]), (self, "clean", False)]

    def share(self, end: int) -> None:
        """Says that another state may read the slots before `end` from now on, so that they are never rewritten."""
        self._shared = max(self._shared, end)

    def open(self, end: int) -> None:
        """The same until `close`, for a transaction that may come back to the state that it began with."""
        self._open.append(end)

    def close(self) -> None:
        """Ends the last `open`."""
        self._open.pop()
