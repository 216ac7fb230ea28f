"""Lease of buffers, the right to append to them in place, and exchange, the one way to publish what a call wrote."""

from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch

from ..errors import CacheStateError, ConcurrentUseError

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

    `acquire` takes the right, for a write; `renew` gives it to the next state; `share` says that another state reads
    the buffers too, which never acquires.

    (It keeps versions, not states: a cycle would keep buffers alive until the next garbage collection.)
    """

    __slots__ = ("_forked", "_holder", "_in_transactions", "zero_beyond")

    def __init__(self, holder: object = None, *, zero_beyond: bool = True) -> None:
        self._holder = [] if holder is None else [holder]
        self.zero_beyond = zero_beyond
        """Whether slots beyond the holder's tokens are zero, as rows of different lengths need: theirs are read, with
        weight 0."""
        self._forked = 0
        self._in_transactions: list[int] = []

    @property
    def holder(self) -> object:
        """The version of the state that may append in place; None during a write, and after a failed one."""
        return next(iter(self._holder), None)

    @property
    def shared(self) -> int:
        """The end of the slots that other states read, and that therefore are not rewritten."""
        return max(self._forked, *self._in_transactions, 0)

    def acquire(self, version: object) -> bool:
        """Takes the right, if it is this state's; of several threads one gets it."""
        holder = self._holder
        try:
            return version in holder and holder.pop() is version
        except IndexError:
            return False

    def renew(self, version: object) -> list[Attribute]:
        """The changes that make the state of this version the holder."""
        return [(self, "_holder", [version])]

    def share(self, end: int, until: ExitStack | None = None) -> None:
        """Says that another state reads the slots before `end`, so that they are not rewritten.

        For good, as after a fork; or until a stack is closed, for a transaction that may return to its first state.
        """
        if until is None:
            self._forked = max(self._forked, end)
            return
        self._in_transactions.append(end)
        until.callback(self._in_transactions.remove, end)


def check_no_recompute() -> None:
    """Raises CacheStateError inside backward, where activation checkpointing calls once more and no call may append."""
    if torch._C._current_graph_task_id() != -1:
        raise CacheStateError(
            "kv_cache: a recompute inside backward would append the same tokens twice; "
            "use none (use_kv_cache = False) where activations are checkpointed"
        )
