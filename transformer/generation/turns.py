"""Turns of the calls of one object: those of several threads one after the other, none inside of another."""

from threading import Lock, get_ident
from types import TracebackType

from ..errors import ConcurrentUseError


class Turns:
    """A context that one call at a time is in: other threads wait, and a call from inside it is refused.

    Args:
        name: the name of the object, for the error.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = Lock()
        self._thread: int | None = None

    def __enter__(self) -> None:
        if self._thread == get_ident():
            raise ConcurrentUseError(
                f"{self._name}: expected one call at a time, got one from inside another, such as from a processor or "
                "a hook; call it when that one is over"
            )
        self._lock.acquire()
        self._thread = get_ident()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread = None
        self._lock.release()
