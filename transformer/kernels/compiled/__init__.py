"""Compiled CPU kernels: loops that numba compiles on the user's machine, run by the threads of PyTorch itself.

Nothing here imports numba before a kernel is needed. `may_compute` says whether kernels may run; a `CompiledKernel` is
compiled or read from disk at its first use, and runs over a tuple of addresses and sizes.
"""

from .kernel import CompiledKernel, built_by
from .layouts import FLOAT_DTYPES
from .pool import usable_threads
from .switch import are_available, may_compute

__all__ = ["FLOAT_DTYPES", "CompiledKernel", "are_available", "built_by", "may_compute", "usable_threads"]
