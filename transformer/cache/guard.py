"""Refuses calls that would write into a cache out of turn."""

import threading
from types import TracebackType

import torch

from ..errors import CacheStateError, ConcurrentUseError


class Guard:
    """A context manager that only one call can be inside; a second one is refused at once, whatever its thread.

    A recompute inside backward (activation checkpointing) is refused too: it would append the same tokens twice.
    Copies and pickles of it are new and free: a lock belongs to one module or cache.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if torch._C._current_graph_task_id() != -1:
            raise CacheStateError(
                "kv_cache: a recompute inside backward would append the same tokens twice; "
                "use none (use_kv_cache = False) where activations are checkpointed"
            )
        if not self._lock.acquire(blocking=False):
            raise ConcurrentUseError(
                "kv_cache: another call with it is still running, expected one call at a time; "
                "give each thread its own module or cache (copy.deepcopy), or wait for the first call"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["Guard"], tuple[()]]:
        return Guard, ()
