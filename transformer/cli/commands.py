"""Argument parser and exit status of all commands."""

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
"""Errors that the user sees as one line. All other errors are faults of the library and keep their traceback."""

SCRIPT = "modular-attention"


def program_name() -> str:
    """The command that started the program: the installed script, or `python -m transformer`."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else "python -m transformer"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. The exit status is 0; 2 for an error; 130 after Ctrl-C; 1 if the reader closed the output."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Some encodings lack characters that models write. The standard error escapes such characters itself.
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
        # The reader closed the output. Without this, Python reports the broken pipe again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except FAILURES as error:
        print(shown(error_line(error), sys.stderr), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
