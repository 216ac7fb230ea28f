"""All or nothing over several layers: either all of them have taken the step, or none has."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from .contents import Contents
from .layer import LayerCache
from .state import State


class Holder(Protocol):
    """Whatever has a layer's cache."""

    kv_cache: LayerCache | None


@contextmanager
def transaction(holders: Iterable[Holder]) -> Iterator[None]:
    """Leaves every cache as it was where an exception comes out; then lets the exception pass.

    It costs no tensor operation: states are immutable, and what they refer to is not rewritten while it is open.
    """
    before = []
    try:
        for holder in holders:
            cache = holder.kv_cache
            contents = Contents() if cache is None else cache.contents
            if isinstance(contents.state, State):
                contents.state.storage.open.append(max(contents.state.slot(contents.state.length)))
            before.append((holder, cache, contents))
        yield
    except BaseException:
        for holder, cache, contents in before:
            if cache is not None:
                cache.put(contents)
            holder.kv_cache = cache
        raise
    finally:
        for _, _, contents in before:
            if isinstance(contents.state, State):
                contents.state.storage.open.pop()
