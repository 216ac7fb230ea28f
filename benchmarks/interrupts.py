"""Interrupts of a call: by a signal at a random time, or at a chosen line of the library."""

import random
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from .interrupted import Interrupt, Subject

TRACED = ("/cache/", "/generation/", "/attention/base.py", "/blocks/stack.py", "/cli/conversation.py")
"""Files of the library in which calls are interrupted line by line."""


def signals(kind: type[Subject], count: int, seed: int = 0) -> list[Interrupt]:
    """The given number of signals, each at a random time during a call."""
    dice = random.Random(seed)
    with torch.no_grad():
        subject, seconds = kind(), []
        for _ in range(20):
            began = time.perf_counter()
            subject.call()
            seconds.append(time.perf_counter() - began)
            if subject.length() > kind.most_tokens:
                subject.put(subject.start)
    took = sorted(seconds)[10]
    return [after(dice.uniform(1e-6, 1.05 * took)) for _ in range(count)]


def after(seconds: float) -> Interrupt:
    """A signal after `seconds`, if the call still runs."""

    def interrupt(call: Callable[[], object]) -> bool:
        armed, interrupted = True, False

        def raise_once(*_: object) -> None:
            nonlocal armed, interrupted
            if armed:
                armed, interrupted = False, True
                raise KeyboardInterrupt

        handler = signal.signal(signal.SIGALRM, raise_once)
        # The handler raises once, and only while it is armed, so no interrupt can occur after the inner block.
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                call()
                armed = False
            except Exception:
                armed = False
        except KeyboardInterrupt:
            pass
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        return interrupted

    return interrupt


def lines(kind: type[Subject], most: int) -> list[Interrupt]:
    """An interrupt at the beginning of each line that a call runs in `TRACED`, or at `most` of them, evenly spread."""
    with torch.no_grad():
        subject = kind()
        subject.call()
        total = _trace(subject.call, None)[0]
    step = max(1, -(-total // most))
    return [at_line(number) for number in range(1, total + 1, step)]


def at_line(number: int) -> Interrupt:
    """An interrupt at the n-th line."""
    return lambda call: _trace(call, number)[1]


def _trace(call: Callable[[], object], number: int | None) -> tuple[int, bool]:
    count, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        name = frame.f_code.co_filename.replace("\\", "/")
        if event == "call":
            return trace if "/transformer/" in name and any(part in name for part in TRACED) else None
        if event == "line":
            count += 1
            if count == number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except (KeyboardInterrupt, Exception):
        pass
    finally:
        sys.settrace(before)
    return count, number is not None and count >= number
