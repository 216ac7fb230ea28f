"""Program in a pseudo-terminal: its input and its output."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Mapping

# A session leader without a terminal gets the first one that it opens; then Ctrl-C is a signal.
_TAKE_TERMINAL = "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execv(sys.executable, sys.argv[1:])"


class Terminal:
    """It shows no more than the program writes, and waits for nothing but that."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self.shown = ""
        self._looked_at = 0
        self._modes = termios.tcgetattr(theirs)
        command = [sys.executable, "-c", _TAKE_TERMINAL, sys.executable, *arguments]
        self._theirs = theirs
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)

    def type(self, text: str) -> None:
        """Types, as fast as the program takes it."""
        content = text.encode()
        while content:
            readable, writable, _ = select.select([self._ours], [self._ours], [], 60)
            if readable:
                self._read()
            if writable:
                content = content[os.write(self._ours, content[:256]) :]

    def paste(self, text: str) -> None:
        """Pastes in brackets, as terminals do where a program asks for it."""
        self.type(f"\x1b[200~{text}\x1b[201~")

    def interrupt(self, pattern: str) -> None:
        """Types Ctrl-C until it has an effect: Python's readline sleeps through one that comes just before it waits."""
        self.type("\x03")
        try:
            self.wait_for(pattern, seconds=10)
        except AssertionError:
            self.type("\x03")
            self.wait_for(pattern)

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Waits until what is shown since the last match has the pattern."""
        end = time.monotonic() + seconds
        while True:
            found = re.compile(pattern).search(self.shown, self._looked_at)
            if found:
                self._looked_at = found.end()
                return found
            left = end - time.monotonic()
            if left < 0 or not select.select([self._ours], [], [], left)[0]:
                raise AssertionError(f"no {pattern!r} in {self.shown[self._looked_at :]!r}")
            self._read()

    def end(self) -> int:
        """Waits for the program's end: its exit status. The terminal is then as it was."""
        while self.process.poll() is None:
            if select.select([self._ours], [], [], 0.05)[0]:
                self._read()
        assert termios.tcgetattr(self._theirs) == self._modes
        return self.process.returncode

    def close(self) -> None:
        """Kills what is left."""
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    def _read(self) -> None:
        self.shown += os.read(self._ours, 65536).decode("utf-8", "replace")
