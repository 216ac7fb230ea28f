"""Fixtures of tests of checkpoints: small folders, one thread for tiny models, and no progress bars."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from tests.checkpoints.folders import small_folder


@pytest.fixture(autouse=True, scope="package")
def _quiet_and_single() -> Iterator[None]:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_folder(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return small_folder(tmp_path / "sharded", shards=True)
