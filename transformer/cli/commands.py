"""One parser for all commands, and one way in which they fail."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..errors import AttentionError
from . import chat, generate, inspect
from .output import error_line, shown

FAILURES = (AttentionError, OSError, ModuleNotFoundError, UnicodeError)
"""What is said to the user in one line; anything else is a fault of the library, and shows where."""

SCRIPT = "modular-attention"


def program_name() -> str:
    """The command that started the program: the installed script, or `python -m transformer`."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else "python -m transformer"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name; the exit status is 0, 2 for what cannot work, 130 after Ctrl-C,
    and 1 where nobody reads the output any more."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Models write characters that not every encoding has; the standard error escapes them by itself.
        sys.stdout.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(program_name(), description="Models of checkpoints, at the terminal.")
    parser.add_argument("--version", action="version", version=__version__)
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
