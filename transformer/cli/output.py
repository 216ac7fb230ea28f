"""Output: what models write goes to the standard output, and nothing else; words for the user to the standard error."""

import re
import sys
from typing import TextIO

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that a terminal obeys, other than new line and tab."""


def write(text: str, end: str = "") -> None:
    """Prints what a model writes, at once."""
    print(shown(text, sys.stdout), end=end, flush=True)


def tell(text: str) -> None:
    """Prints a line in brackets, or several lines as they are."""
    print(shown(text if "\n" in text else f"[{text}]", sys.stderr), file=sys.stderr, flush=True)


def shown(text: str, stream: TextIO) -> str:
    """The text as it is; for a terminal with control characters written out, such as \\x1b: they could move the cursor,
    rename the window or type for the user."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text) if stream.isatty() else text


def error_line(error: BaseException) -> str:
    """An error in one line; one of the system without its number."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename2 or error.filename}: {error.strerror}"
    return f"error: {' '.join(text.split())}"
