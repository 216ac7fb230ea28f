"""Chats in a terminal: pasted lines arrive complete, several are one message, Ctrl-C warns once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cli.terminal import Terminal

pytest.importorskip("termios", reason="pseudo-terminals are of POSIX")

READ = r"([\d,]+) tokens? read, 3 written"
WITHOUT = {"prompt_toolkit": (), "readline": ("prompt_toolkit",), "neither": ("prompt_toolkit", "readline")}
"""Modules that an editor has to do without."""


@pytest.fixture
def chat(with_window: Path, tmp_path: Path) -> Iterator[Callable[[str], Terminal]]:
    with ExitStack() as stack:

        def start(editor: str) -> Terminal:
            for module in WITHOUT[editor]:
                (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError('{module}')")
            path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), os.getcwd()])
            environment = {**os.environ, "PYTHONPATH": path, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
            arguments = ["-m", "transformer", "chat", str(with_window), "--max-new-tokens", "3"]
            terminal = Terminal(arguments, environment)
            stack.callback(terminal.close)
            return terminal

        yield start


@pytest.mark.slow
@pytest.mark.parametrize("editor", ["prompt_toolkit", "readline"])
def test_lines_arrive_whole_and_ctrl_c_warns_once(chat, editor):
    terminal = chat(editor)
    # Before the program takes the terminal over, the kernel cuts lines: no part of one is taken for the whole.
    terminal.type("x" * 10_000 + "\r")
    terminal.wait_for("input from before the start is dropped, as the terminal may have cut it at 4,095 bytes")
    terminal.wait_for("/help lists the commands")
    terminal.wait_for("\x1b\\[\\?2004h")  # the prompt asks for pasted text in brackets
    terminal.paste("x" * 10_000)
    terminal.type("\r")
    terminal.wait_for("\x1b\\[\\?2004l")  # the editor has the line, and more is typed while it is answered
    terminal.type("y" * 5_000 + "\ré\r")
    assert [terminal.wait_for(READ)[1] for _ in range(3)] == ["10,000", "5,001", "3"]

    terminal.wait_for("\x1b\\[\\?2004h")
    terminal.paste("one\r\r/undo\rtwo")
    terminal.type("\r")
    assert terminal.wait_for(READ)[1] == "15"
    terminal.type("/history\r")
    terminal.wait_for("user:\r\none\r\n\r\n/undo\r\ntwo\r\nassistant:")
    terminal.type('"""one\rtwo"""\r')
    assert terminal.wait_for(READ)[1] == "8"

    terminal.wait_for("> ?")
    terminal.type("abc")
    terminal.wait_for("c")
    terminal.interrupt("Ctrl-C again ends the chat")
    terminal.wait_for("> ?")
    terminal.type("wxyz\x1b[D\x7f\r")  # a line is edited: one to the left, and a letter away
    assert terminal.wait_for(READ)[1] == "4"
    terminal.wait_for("> ?")
    terminal.type("\x1b[Av\r")  # and comes back
    assert terminal.wait_for(READ)[1] == "5"
    terminal.wait_for("> ?")
    terminal.interrupt("Ctrl-C again ends the chat")
    terminal.wait_for("> ?")
    terminal.interrupt("\x1b\\[\\?2004l")
    assert terminal.end() == 0


def test_a_line_that_the_terminal_may_have_cut_is_refused(chat):
    terminal = chat("neither")
    terminal.wait_for("> ")
    terminal.type("x" * 5_000 + "\r")
    terminal.wait_for(r"error: the terminal cuts lines at 4,095 bytes, .* pip install -e")
    terminal.wait_for("> ")
    terminal.type("wxyz\x7f\r")
    assert terminal.wait_for(READ)[1] == "3"
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
