"""Exchange of attributes of slots, caches and leases, all at once: how every call publishes its writes."""

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
