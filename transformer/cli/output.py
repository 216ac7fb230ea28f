"""Output: text of models on the standard output, notices for the user on the standard error."""

import re
import sys
from typing import TextIO

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters, except new line and tab."""


def write(text: str, end: str = "") -> None:
    """Prints text of a model without buffering."""
    print(shown(text, sys.stdout), end=end, flush=True)


def notify(text: str) -> None:
    """Prints a notice: one line in brackets, several lines unchanged."""
    print(shown(text if "\n" in text else f"[{text}]", sys.stderr), file=sys.stderr, flush=True)


def shown(text: str, stream: TextIO) -> str:
    """The text, for a terminal with escaped control characters (such as \\x1b), which could move the cursor, rename the
    window or type for the user."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text) if stream.isatty() else text


def error_line(error: BaseException) -> str:
    """An error as one line; an error of the system without its number."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename2 or error.filename}: {error.strerror}"
    return f"error: {' '.join(text.split())}"
