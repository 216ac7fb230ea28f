"""Switch of the compiled kernels: whether numba is installed, and whether they are turned off."""

import os
import platform
import sys
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ...tracing import is_plain_eager
from ..backends import request

VARIABLE = "MODULAR_ATTENTION_COMPILED"
"""Environment variable, read once: `0` leaves the compiled kernels out."""


@cache
def are_available() -> bool:
    """Whether this process may compile: numba is installed, numbers are little-endian, the variable is not `0`.

    And the processor converts float16 numbers: LLVM would call a function that is not there, which ends the process.
    """
    wanted = os.environ.get(VARIABLE, "1") != "0" and sys.byteorder == "little" and _converts_float16()
    return wanted and find_spec("numba") is not None


def _converts_float16() -> bool:
    """False for an x86 processor without AVX2, and where numba is told to compile for one."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    plain = os.environ.get("NUMBA_CPU_NAME") in ("generic", "x86-64")
    return not plain and "AVX" in torch.backends.cpu.get_cpu_capability()


def may_compute(x: Tensor) -> bool:
    """Whether compiled kernels may compute from `x`: on the CPU, unless a call is observed or asks for another backend.

    A dispatch mode, such as a counter of operations, sees what PyTorch runs and not these kernels, so it switches them
    off. No gradients are recorded, nothing is traced, autocast is off, and `x` is a plain tensor.
    """
    return (
        x.is_cpu
        and not torch.compiler.is_dynamo_compiling()
        and request.allows_compiled
        and not torch.is_grad_enabled()
        and are_available()
        and not torch.is_autocast_enabled("cpu")
        and is_plain_eager(x)
    )
