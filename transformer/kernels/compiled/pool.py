"""Threads of PyTorch: the OpenMP pool of the process, which compiled kernels share.

A second pool would compete with PyTorch's threads, which wait in a loop after each operation. The pool is found as the
symbol `GOMP_parallel` among the libraries that PyTorch itself is linked with: GNU's and LLVM's OpenMP on Linux have
it. Several Python threads may enter it at once. Where it is missing, and in a forked child, whose threads did not come
along, a kernel runs in the calling thread.
"""

import ctypes
import os
import sys
from pathlib import Path

import torch

CHUNKS_PER_THREAD = 4
"""Of norms, rotation and attention, so that no thread waits for one that began late."""


def _openmp() -> int:
    """The address of OpenMP's entry into a parallel region; 0 where there is none."""
    try:
        # Symbols are looked up among the libraries that this one depends on, too.
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


class _Pool:
    address: int | None = None
    """Of `GOMP_parallel`; 0 where kernels run in the calling thread, None before anybody has looked."""


def _leave() -> None:
    _Pool.address = 0


if sys.platform != "win32":
    # Before any kernel: a child may be forked once PyTorch alone has used the threads, and find no pool of its own.
    os.register_at_fork(after_in_child=_leave)


def find() -> None:
    """Looks for the pool, once, before the first kernel runs."""
    if _Pool.address is None:
        _Pool.address = _openmp()


def entry() -> int:
    """The address of the pool's entry; 0 where kernels run in the calling thread."""
    return _Pool.address or 0


def usable_threads() -> int:
    """Threads that a kernel may use: as many as `torch.set_num_threads` says, or one where there is no pool."""
    find()
    return torch.get_num_threads() if _Pool.address else 1
