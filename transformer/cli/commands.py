"""One parser for all commands, and one way in which they fail."""

import argparse
import sys
from collections.abc import Sequence

from ..errors import AttentionError
from . import chat, generate, inspect

FAILURES = (AttentionError, OSError, ModuleNotFoundError, UnicodeError)
"""What is said to the user in one line; anything else is a fault of the library, and shows where."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name; the exit status is 0, 2 for what cannot work, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser("python -m transformer", description="Models of checkpoints, at the terminal.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (chat, generate, inspect):
        command.add_to(commands)
    options = parser.parse_args(argv)
    try:
        options.run(options)
    except FAILURES as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
