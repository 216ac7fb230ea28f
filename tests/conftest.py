"""Fixtures that make all runs of the suite equal: fixed seeds, threads and hypothesis examples."""

import gc

import pytest
import torch
from hypothesis import register_random, settings

# Tensors here are so small that a second thread does nothing but wait, which costs a core. Children that are forks need
# it too: they take only the calling thread along.
torch.set_num_threads(1)

# A failure has to be the same one on the next run and on the next machine, however slow that is.
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")


class TorchRandom:
    """Torch's global generator, in the words of `random.Random`."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


# The fixture below seeds once per test function; hypothesis has to do so for each of its examples, or a
# shrunken example would see other weights than the one that failed. It holds a weak reference only.
torch_random = TorchRandom()
register_random(torch_random)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _set_aside() -> None:
    """Takes what is there when a file begins, a million imported objects, out of every later collection of garbage:
    these took a third of the tests' time."""
    gc.collect()
    gc.freeze()
