"""A library in a process of its own, which works when it is asked to: requests and answers are lines of JSON.

An answer takes some 50 microseconds, which is nothing beside the work that is asked for.
"""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any


class OwnProcess:
    """A process that runs a program of this folder; it ends with `close`, with this object, or with this process."""

    def __init__(self, program: str, *arguments: str, folder: Path | None = None) -> None:
        # The program as text: a path would put the folder of the benchmarks before that of the library.
        text = Path(__file__).with_name(program).read_text(encoding="utf-8")
        environment = os.environ | ({} if folder is None else {"PYTHONPATH": str(folder)})
        self._process = subprocess.Popen(
            [sys.executable, "-c", text, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.close = weakref.finalize(self, self._process.communicate)

    def ask(self, **request: Any) -> Any:
        """The answer to one request."""
        self.tell(**request)
        return self.answer()

    def tell(self, **request: Any) -> None:
        """Gives it a request, and does not wait."""
        process = self._process
        if process.stdin is None:
            raise RuntimeError("the process was started without pipes")
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()

    def answer(self) -> Any:
        """The answer to the first request that has none."""
        process = self._process
        if process.stdout is None:
            raise RuntimeError("the process was started without pipes")
        answer = process.stdout.readline()
        if not answer:
            self.close()
            raise RuntimeError(
                f"the other process ended with exit status {process.returncode}; its message stands above"
            )
        return json.loads(answer)
