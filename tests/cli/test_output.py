"""Control characters in the output of a model: escaped at a terminal, unchanged through a pipe."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

from transformer.cli.chat_session import ChatSession
from transformer.cli.conversation import Cost, Transcript
from transformer.cli.output import notify, shown, write


class Stream(io.StringIO):
    """A terminal, or a pipe."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


RAW = "a\tb\n\x1b[2Jc\x08\x00\r\x7f\x9b1mé\u2028字"
SHOWN = "a\tb\n\\x1b[2Jc\\x08\\x00\\x0d\\x7f\\x9b1mé\u2028字"


CASES = pytest.mark.parametrize(("terminal", "expected"), [(True, SHOWN), (False, RAW)])


def replaced(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> list[Stream]:
    """New streams in the place of the standard output and the standard error."""
    streams = [Stream(terminal=terminal) for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)
    return streams


@CASES
def test_text_is_shown_as_the_stream_bears_it(monkeypatch: pytest.MonkeyPatch, terminal: bool, expected: str) -> None:
    out, err = replaced(monkeypatch, terminal=terminal)
    write(RAW)
    notify(RAW)
    assert out.getvalue() == expected
    assert err.getvalue() == f"{expected}\n"


def test_each_stream_is_asked_for_itself() -> None:
    assert shown(RAW, Stream(terminal=True)) == SHOWN
    assert shown(RAW, Stream(terminal=False)) == RAW


class Answering:
    """A conversation whose model writes control characters."""

    transcript = Transcript(({"role": "assistant", "content": RAW},), (1,), (0,))
    cache = type("Cache", (), {"nbytes": 0})

    def ask(self, _text: str, show: Callable[[str], None]) -> Cost:
        for character in RAW:
            show(character)
        return Cost(1, 1)


@CASES
def test_answers_and_history_are_shown_so(monkeypatch: pytest.MonkeyPatch, terminal: bool, expected: str) -> None:
    out, err = replaced(monkeypatch, terminal=terminal)
    session = ChatSession(Answering(), {})
    session.answer("Hello")
    assert out.getvalue() == f"{expected}\n"
    session.show_history()
    assert err.getvalue().endswith(f"assistant:\n{expected}\n")
