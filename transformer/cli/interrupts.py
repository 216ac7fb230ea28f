"""Ctrl-C in a chat: it interrupts only input and answers."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

Result = TypeVar("Result")


class Interrupts:
    """Raises KeyboardInterrupt at Ctrl-C, but only inside `run`. Ctrl-C between two runs is raised by the next run.

    The exception can therefore not occur where nothing catches it. Of several Ctrl-C in one run, the first is raised
    there, and the next run raises one more.
    """

    def __init__(self) -> None:
        self._can_raise = False
        self._is_pending = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replaces Python's handler of Ctrl-C, and restores it."""
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def run(self, action: Callable[[], Result]) -> Result:
        """The result of `action()`. Raises KeyboardInterrupt at Ctrl-C."""
        try:
            self._can_raise = True
            if self._is_pending:
                self._is_pending = False
                raise KeyboardInterrupt
            return action()
        finally:
            self._can_raise = False

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        if not self._can_raise:
            self._is_pending = True
            return
        self._can_raise = False
        raise KeyboardInterrupt
