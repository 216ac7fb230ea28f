"""One thread: tensors of these tests are so small that a second one does nothing but wait, which costs a core."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Children that are forks need it too: they take only the calling thread along."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
