"""One parser for all commands, and one way in which they fail."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from ..errors import AttentionError
from . import chat, generate, inspect
from .output import error_line, shown

FAILURES = (AttentionError, OSError, ModuleNotFoundError, UnicodeError)
"""What is said to the user in one line; anything else is a fault of the library, and shows where."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name; the exit status is 0, 2 for what cannot work, 130 after Ctrl-C,
    and 1 where nobody reads the output any more."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Models write characters that not every encoding has; the standard error escapes them by itself.
        sys.stdout.reconfigure(errors="replace")
    parser = argparse.ArgumentParser("python -m transformer", description="Models of checkpoints, at the terminal.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (chat, generate, inspect):
        command.add_to(commands)
    options = parser.parse_args(argv)
    try:
        options.run(options)
    except BrokenPipeError:
        # Nobody reads the output any more; without this, Python would complain of it once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except FAILURES as error:
        print(shown(error_line(error), sys.stderr), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
