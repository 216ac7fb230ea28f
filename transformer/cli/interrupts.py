"""Ctrl-C in a chat: it ends what is waited for, and never comes in between."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

Result = TypeVar("Result")


class Interrupts:
    """Ctrl-C as KeyboardInterrupt, but only within `run`: what comes between two runs is raised by the next one.

    So there is no place at which it could end a chat past whoever catches it. Of several within one run, the first is
    raised there, and the next run raises another.
    """

    def __init__(self) -> None:
        self._can_raise = False
        self._is_due = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Takes Ctrl-C over from Python, and gives it back."""
        before = signal.signal(signal.SIGINT, self._take)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def run(self, action: Callable[[], Result]) -> Result:
        """The result of `action`; raises KeyboardInterrupt at Ctrl-C."""
        try:
            self._can_raise = True
            if self._is_due:
                self._is_due = False
                raise KeyboardInterrupt
            return action()
        finally:
            self._can_raise = False

    def _take(self, _signal: int, _frame: FrameType | None) -> None:
        if not self._can_raise:
            self._is_due = True
            return
        self._can_raise = False
        raise KeyboardInterrupt
