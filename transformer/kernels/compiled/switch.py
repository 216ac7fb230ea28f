"""Switch of the compiled kernels: whether numba works, and whether they are turned off."""

import logging
import os
import platform
import sys
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ...tracing import is_plain_eager
from ..backends import request

logger = logging.getLogger("transformer.kernels")

VARIABLE = "MODULAR_ATTENTION_COMPILED"
"""Environment variable, read once: `0` leaves the compiled kernels out."""

LEAST_NUMBA = 0, 61
"""The version from which numba compiles these kernels, as in the extra `fast`."""


@cache
def are_available() -> bool:
    """Whether this process may compile: numba works, numbers are little-endian, the variable is not `0`.

    And the processor converts float16 numbers: LLVM would call a function that is not there, which ends the process.
    Imports numba, once, so callers ask first whether a call is on the CPU and without gradients. Where numba is
    installed and cannot be used, the log `transformer.kernels` says why.
    """
    wanted = os.environ.get(VARIABLE, "1") != "0" and sys.byteorder == "little" and _converts_float16()
    if not wanted or find_spec("numba") is None:
        return False
    reason = _reason_against_numba()
    if reason is not None:
        logger.warning("numba is installed, but CPU kernels are not compiled, which is slower: %s", reason)
    return reason is None


def _reason_against_numba() -> str | None:
    try:
        import numba
    except Exception as error:  # of any kind: numba checks numpy, and loads LLVM
        return f"importing it failed: {error}"
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set"
    if numba.version_info.short < LEAST_NUMBA:
        return f"expected version {'.'.join(map(str, LEAST_NUMBA))} or later, got {numba.__version__}"
    return None


def _converts_float16() -> bool:
    """False for an x86 processor without AVX2, where numba is told to compile for one, and for unknown processors."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return True
    plain = os.environ.get("NUMBA_CPU_NAME") in ("generic", "x86-64")
    return machine in ("x86_64", "amd64") and not plain and "AVX" in torch.backends.cpu.get_cpu_capability()


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
