"""An earlier version of the library beside the others: in a process of its own, with its own copy of `transformer`.

`git archive` exports the version into a temporary folder, so that it needs nothing but a clone with that commit.
"""

import subprocess
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
from .own_process import OwnProcess

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


class BeforeProcess(OwnProcess):
    """A process that has loaded the library of `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__("before_process.py", str(torch.get_num_threads()), folder=folder)

    def writing(self, arguments: list[Any], options: dict[str, Any], dtype: torch.dtype, prompt: Tensor, new: int):
        """Candidate: greedy generation by a decoder-only model of these arguments and options."""
        name = str(dtype).removeprefix("torch.")
        self.ask(build=[arguments, options], dtype=name, prompt=prompt.tolist(), new=new)
        return Candidate(lambda: self.ask())
