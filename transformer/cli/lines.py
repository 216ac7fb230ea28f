"""Input of messages, from a terminal with line editing and history, or from a pipe."""

import io
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import ArgumentError
from .output import notify

PROMPT, MORE = "> ", "... "

QUOTES = '"""'

LINE_LIMIT = 4095
"""Maximum bytes of a line while the kernel edits lines (N_TTY_BUF_SIZE - 1); the terminal drops further bytes."""

LineReader = Callable[[str], str]
"""Function that shows a prompt on a terminal, and gives a line of any length, or several pasted lines.

It raises EOFError at the end of the input, and KeyboardInterrupt at Ctrl-C.
"""


@dataclass(frozen=True)
class Entry:
    """Input of the user: a message, or a command, which is one line that begins with a slash."""

    text: str
    is_command: bool


def read_entry(read_line: LineReader) -> Entry:
    """The next entry. Lines between three opening quotes and three closing quotes are one message.

    Raises as `read_line` does, and ArgumentError if the input ends before the closing quotes.
    """
    text = read_line(PROMPT)
    if not text.lstrip().startswith(QUOTES) or ("\n" in text and not _is_closed(text)):
        return Entry(text, text.lstrip().startswith("/") and "\n" not in text.strip())
    try:
        while not _is_closed(text):
            text += "\n" + read_line(MORE)
    except EOFError:
        raise ArgumentError(f"the input ended in a message that begins with {QUOTES}: it ends with {QUOTES}") from None
    return Entry(text.strip().removeprefix(QUOTES).removesuffix(QUOTES).strip("\n"), is_command=False)


def _is_closed(text: str) -> bool:
    return len(text.strip()) >= 2 * len(QUOTES) and text.rstrip().endswith(QUOTES)


@contextmanager
def open_lines() -> Iterator[LineReader]:
    """A reader of the standard input: by prompt_toolkit (extra `chat`), else by readline, else without line editing."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are not text become surrogate escapes, which tokenizers handle.
        sys.stdin.reconfigure(errors="surrogateescape")
    if not sys.stdin.isatty():
        yield lambda _prompt: _next_line()
        return
    editor = _prompt_toolkit() or _readline()
    if editor is None:
        yield _then_new_line(_unedited)
        return
    with _unlimited_lines():
        yield editor


def _prompt_toolkit() -> LineReader | None:
    """Line editing in which several pasted lines are one entry; None without the package or a screen."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output
        from prompt_toolkit.output.vt100 import Vt100_Output
    except ModuleNotFoundError:
        return None
    if not (sys.stdout.isatty() or sys.stderr.isatty()):
        return None
    output = create_output(always_prefer_tty=True)
    if isinstance(output, Vt100_Output):
        # The terminal's reply to a query of the cursor position would mix with input that is typed ahead.
        output.enable_cpr = False
    session: PromptSession[str] = PromptSession(output=output)
    return session.prompt


def _readline() -> LineReader | None:
    """Line editing of the standard library; None without a screen on the standard output."""
    try:
        import readline
    except ModuleNotFoundError:
        return None
    if not sys.stdout.isatty():
        return None
    # Python turns this off, because its own prompt accepts single lines only.
    readline.parse_and_bind("set enable-bracketed-paste on")
    return _then_new_line(input)


def _then_new_line(read_line: LineReader) -> LineReader:
    """Adds a line break after the prompt if no line was entered, so that the next notice begins a line."""

    def read(prompt: str) -> str:
        try:
            return read_line(prompt)
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            raise

    return read


def _unedited(prompt: str) -> str:
    """A line that the kernel edited. Raises ArgumentError if it may have been cut."""
    print(prompt, end="", file=sys.stderr, flush=True)
    line = _next_line()
    if len(line.encode("utf-8", "surrogateescape")) >= LINE_LIMIT:
        raise ArgumentError(
            f"the terminal cuts lines at {LINE_LIMIT:,} bytes, and this one may be longer: "
            'pip install -e ".[chat]" in the checkout of modular-attention, or send it through a pipe'
        )
    return line


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


@contextmanager
def _unlimited_lines() -> Iterator[None]:
    """Turns line editing of the kernel off, so that input between two prompts is not cut."""
    try:
        import fcntl
        import termios
    except ModuleNotFoundError:  # a system without POSIX terminals
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    changed = termios.tcgetattr(sys.stdin)
    changed[3] &= ~termios.ICANON
    changed[6][termios.VMIN], changed[6][termios.VTIME] = 1, 0
    termios.tcsetattr(sys.stdin, termios.TCSANOW, changed)
    try:
        (waiting,) = struct.unpack("i", fcntl.ioctl(sys.stdin, termios.FIONREAD, bytes(4)))
        if waiting >= LINE_LIMIT:
            termios.tcflush(sys.stdin, termios.TCIFLUSH)
            notify(f"input from before the start is dropped, as the terminal may have cut it at {LINE_LIMIT:,} bytes")
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
