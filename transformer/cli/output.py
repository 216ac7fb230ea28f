"""Words for the user, on the standard error: the standard output carries what models write, and nothing else."""

import sys


def tell(text: str) -> None:
    """Prints a line in brackets, or several lines as they are."""
    print(text if "\n" in text else f"[{text}]", file=sys.stderr, flush=True)


def error_line(error: BaseException) -> str:
    """An error in one line; one of the system without its number."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename2 or error.filename}: {error.strerror}"
    return f"error: {' '.join(text.split())}"
