"""Ctrl-C in a chat: it is raised only during input and answers."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from itertools import combinations
from types import FrameType
from typing import Any

import pytest

from tests.internals import run_chat
from transformer.cli import chat, lines
from transformer.cli.interrupts import Interrupts


def test_what_comes_between_two_runs_is_raised_by_the_next():
    interrupts, before = Interrupts(), signal.getsignal(signal.SIGINT)
    with interrupts.installed():
        assert interrupts.run(lambda: 5) == 5
        try:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pytest.fail("raised in between")
        with pytest.raises(KeyboardInterrupt):
            interrupts.run(lambda: 5)
        assert interrupts.run(lambda: 5) == 5
    assert signal.getsignal(signal.SIGINT) is before


def test_of_several_within_a_run_the_next_raises_another():
    interrupts, raised = Interrupts(), []

    def answer() -> str:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            raised.append("nothing")
        return "to its end"

    with interrupts.installed():
        assert interrupts.run(answer) == "to its end"
        assert raised == ["nothing"]
        with pytest.raises(KeyboardInterrupt):
            interrupts.run(lambda: 5)
        assert interrupts.run(lambda: 5) == 5


class Session:
    """It notes what it is asked to answer."""

    def __init__(self) -> None:
        self.ended, self.taken = False, []

    def answer(self, text: str) -> None:
        self.taken.append(text)


MESSAGES = ["one", "two", "three"]
FILES = {sys.modules[each.__module__].__file__ for each in (chat.run, Interrupts, lines.read_entry)}


def chat_interrupted_at(line: int | None) -> tuple[list[str], int]:
    """A chat with Ctrl-C before that line of the files that run it: messages that were answered, and lines in all."""
    session, entries, passed = Session(), iter([*MESSAGES[:2], "/nonsense", *MESSAGES[2:]]), 0

    def read_line(_prompt: str) -> str:
        for entry in entries:
            return entry
        raise EOFError

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal passed
        # The handler is not interrupted, as it would have to be by itself; nor is what has not begun yet.
        if frame.f_code.co_filename not in FILES or frame.f_code.co_name in ("_handle", "installed"):
            return None
        if event == "line":
            passed += 1
            if passed == line:
                signal.raise_signal(signal.SIGINT)
        return trace

    interrupts, before = Interrupts(), sys.gettrace()
    with pytest.MonkeyPatch.context() as patch, interrupts.installed():
        patch.setattr(chat.ChatSession, "answer", Session.answer)
        sys.settrace(trace)
        try:
            run_chat(session, read_line, interrupts)
        except KeyboardInterrupt:
            session.taken = ["Ctrl-C ended the chat"]
        finally:
            sys.settrace(before)
    return session.taken, passed


def test_ctrl_c_at_any_line_ends_no_chat_and_loses_one_message_at_the_most():
    whole, count = chat_interrupted_at(None)
    assert whole == MESSAGES
    assert count > 50
    for line in range(1, count + 1):
        taken, _ = chat_interrupted_at(line)
        assert taken in [MESSAGES, *map(list, combinations(MESSAGES, 2))], f"line {line} of {count}"
