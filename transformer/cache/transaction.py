"""All or nothing over several layers: either all of them have taken the step, or none has."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from .layer import LayerCache


class CacheOwner(Protocol):
    """A module with a conversation of its own."""

    kv_cache: LayerCache | None


@contextmanager
def transaction(owners: Iterable[CacheOwner]) -> Iterator[None]:
    """Leaves every cache as it was where an exception comes out of one call of a model, and lets the exception pass.

    It costs no tensor operation: what a cache holds is one immutable value, and a call writes into dead space only.
    """
    before = [
        (owner, cache, None if cache is None else cache.contents) for owner in owners for cache in [owner.kv_cache]
    ]
    try:
        yield
    except BaseException:
        for owner, cache, contents in before:
            if cache is not None and contents is not None:
                cache.contents = contents
            owner.kv_cache = cache
        raise
