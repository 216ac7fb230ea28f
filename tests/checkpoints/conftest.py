"""What all tests of checkpoints share: one thread, as models are tiny, and no progress bars of transformers."""

from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(autouse=True, scope="package")
def _quiet_and_single() -> Iterator[None]:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
