"""Entries of the user: one line, several in quotes, commands; of any length through a pipe."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

from transformer.cli.lines import Entry, open_lines, read_entry
from transformer.errors import ArgumentError


def reader(lines: list[str]) -> Callable[[str], str]:
    left = iter(lines)

    def read(_prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return read


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["Hello"], Entry("Hello", is_command=False)),
        (["  Hello "], Entry("  Hello ", is_command=False)),
        ([""], Entry("", is_command=False)),
        (["/undo"], Entry("/undo", is_command=True)),
        ([" /save a file "], Entry(" /save a file ", is_command=True)),
        (["/usr/bin: pasted\nwith more"], Entry("/usr/bin: pasted\nwith more", is_command=False)),
        (["one\ntwo"], Entry("one\ntwo", is_command=False)),
        (['"""one', "", 'two"""'], Entry("one\n\ntwo", is_command=False)),
        (['"""', "  one", "two", '"""'], Entry("  one\ntwo", is_command=False)),
        (['"""one"""'], Entry("one", is_command=False)),
        (['"""/undo"""'], Entry("/undo", is_command=False)),
        (['"""', '"""'], Entry("", is_command=False)),
        (['""""""'], Entry("", is_command=False)),
        (['""""', 'one""""'], Entry('"\none"', is_command=False)),
        (['"""one\ntwo"""'], Entry("one\ntwo", is_command=False)),
        # Pasted in one piece it is whole, though it only begins with quotes: as a module of Python does.
        (['"""Docstring."""\nimport x'], Entry('"""Docstring."""\nimport x', is_command=False)),
        (['say """'], Entry('say """', is_command=False)),
    ],
)
def test_an_entry_is_a_line_or_what_stands_in_quotes(lines, expected):
    read = reader([*lines, "next"])
    assert read_entry(read) == expected
    assert read("") == "next"


def test_quotes_that_are_not_closed_are_no_message():
    with pytest.raises(ArgumentError, match='the input ended in a message that begins with """'):
        read_entry(reader(['"""one', "two"]))
    with pytest.raises(EOFError):
        read_entry(reader([]))


def test_a_pipe_gives_lines_of_any_length(monkeypatch):
    long = "ü" * 300_000
    # What is no UTF-8 arrives as it is.
    stdin = io.TextIOWrapper(io.BytesIO(f"{long}\nlast".encode() + b"\xff"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    with open_lines() as read_line:
        assert read_line("> ") == long
        assert read_line("> ") == "last\udcff"
        with pytest.raises(EOFError):
            read_line("> ")
