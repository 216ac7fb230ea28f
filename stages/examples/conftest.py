"""Examples as they run from the command line, but in this process."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def start(monkeypatch):
    """Runs an example, named by its path in `examples/`, with options: what its module then contains."""

    def run(name: str, *options: str) -> dict:
        path = EXAMPLES / name
        monkeypatch.syspath_prepend(path.parent)
        monkeypatch.setattr(sys, "argv", [str(path), *options])
        return runpy.run_path(str(path), run_name="__main__")

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)
