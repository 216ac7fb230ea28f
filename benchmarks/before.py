"""An earlier version of the library beside the others: a process of its own, which works when it is asked to.

`git archive` exports the version into a temporary folder, so that it needs nothing but a clone with that commit. The
process has its own copy of `transformer`; requests and answers are lines of JSON, so its turns come between those of
the others. An answer takes some 50 microseconds, which is nothing beside the work that is asked for.
"""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from .case import Candidate

PROGRAM = Path(__file__).with_name("before_process.py")
ROOT = Path(__file__).parent.parent


@contextmanager
def exported(revision: str | None) -> Iterator[Path | None]:
    """The folder of the library at a commit; None for None."""
    if revision is None:
        yield None
        return
    command = ["git", "archive", "--format=tar", revision, "transformer"]
    packed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    with TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder)


class BeforeProcess:
    """A process that has loaded the library of `folder`; it ends with `close`, or with this process."""

    def __init__(self, folder: Path) -> None:
        # The program as text: a path would put the folder of the benchmarks before that of the library.
        command = [sys.executable, "-c", PROGRAM.read_text(encoding="utf-8"), str(torch.get_num_threads())]
        environment = os.environ | {"PYTHONPATH": str(folder)}
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> Any:
        """The answer to one request."""
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the process was started without pipes")
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            self.close()
            raise RuntimeError(
                f"the earlier version ended with exit status {process.returncode}; its message stands above"
            )
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def writing(self, arguments: list[Any], options: dict[str, Any], dtype: torch.dtype, prompt: Tensor, new: int):
        """Candidate: greedy generation by a decoder-only model of these arguments and options."""
        name = str(dtype).removeprefix("torch.")
        self.ask(build=[arguments, options], dtype=name, prompt=prompt.tolist(), new=new)
        return Candidate(lambda: self.ask())
