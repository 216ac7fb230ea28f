"""Threads of compiled kernels: PyTorch's own, entered by several Python threads, forked children and interrupts."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import pytest
import torch
from torch import nn

from transformer.kernels import few_rows, tuned
from transformer.kernels.compiled import are_available, pool
from transformer.kernels.few_rows import project_few_rows

pytestmark = pytest.mark.skipif(not are_available(), reason="numba is missing, or turned off")


@pytest.fixture
def threads():
    """Sets the number of threads, also for few weights; the number of before comes back."""
    before = torch.get_num_threads()
    with tuned(min_parallel_bytes=0):
        yield torch.set_num_threads
    torch.set_num_threads(before)


@torch.no_grad()
def test_equal_bits_on_any_number_of_threads(threads) -> None:
    layers, x = (nn.Linear(64, 300), nn.Linear(64, 7)), torch.randn(1, 3, 64)
    outs = []
    for number in (1, 2, 3):
        threads(number)
        assert pool.usable_threads() == number
        outs.append(torch.cat(project_few_rows(layers, x), -1))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_several_python_threads_at_once(threads) -> None:
    threads(2)
    layer = nn.Linear(256, 512)

    def many(seed: int) -> bool:
        with torch.no_grad():
            x = torch.randn(1, 1, 256, generator=torch.Generator().manual_seed(seed))
            right = project_few_rows((layer,), x)[0]
            return all(torch.equal(project_few_rows((layer,), x)[0], right) for _ in range(200))

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(many, range(8)))


FORKED = """
import os, torch
from torch import nn
from transformer.kernels import project, tuned
torch.set_num_threads(2)
layer, x = nn.Linear(1024, 1024), torch.randn(1, 1, 1024)
with torch.no_grad(), tuned(min_few_rows_weights=1):
    right = project(layer, x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(project(layer, x), right) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
with torch.no_grad(), tuned(min_few_rows_weights=1):
    assert torch.equal(project(layer, x), right)
"""


FORKED_FIRST = """
import math, os, torch
from torch import nn
from transformer.kernels import project, tuned
torch.set_num_threads(2)
layer, x = nn.Linear(1024, 1024), torch.randn(1, 1, 1024)
torch.mm(torch.randn(512, 512), torch.randn(512, 512))
child = os.fork()
if child == 0:
    with torch.no_grad(), tuned(min_few_rows_weights=1, min_parallel_bytes=0):
        out = project(layer, x)
    os._exit(0 if all(map(math.isfinite, out.flatten().tolist())) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize("program", [FORKED, FORKED_FIRST], ids=["after a kernel", "before any"])
def test_a_forked_child_computes_alone(program: str) -> None:
    """The threads of its parent did not come along; the parent goes on with them."""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr


class StoppedError(Exception):
    pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer that signals")
def test_a_signal_within_a_kernel_is_answered_after_it(threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C is: the handler runs once the kernel is done, and the next call is right."""
    threads(2)
    layer, x, ended = nn.Linear(2048, 8192), torch.randn(1, 1, 2048), []

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise StoppedError

    kernel = few_rows.KERNELS[torch.float32, torch.float32]
    run = kernel.load()

    def interrupted(*given) -> None:
        signal.setitimer(signal.ITIMER_REAL, 1e-4)
        run(*given)
        ended.append(True)

    with torch.no_grad():
        right = project_few_rows((layer,), x)[0]
        before = signal.signal(signal.SIGALRM, stop)
        monkeypatch.setattr(kernel, "run", interrupted)
        with pytest.raises(StoppedError):
            _ = [project_few_rows((layer,), x) for _ in range(1000)]
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        monkeypatch.setattr(kernel, "run", run)
        assert torch.equal(project_few_rows((layer,), x)[0], right)
