"""Few rows times matrices by compiled kernels: one call for all weights that read the same rows."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..plain import has_global_hooks
from ..tracing import is_traced
from . import tuning
from .compiled import CompiledKernel, usable_threads, use_compiled
from .linear_weights import LinearWeight, linear_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of rows, and of what comes out."""


def _build(weight_dtype: torch.dtype, dtype: torch.dtype) -> Any:
    # Imported here: it brings numba along.
    from .compiled.loops import few_rows

    return few_rows.build(weight_dtype, dtype)


CHUNK_BYTES, MOST_CHUNKS = 1 << 18, 8
"""Bytes of weights of a chunk at least, where each thread has one, and chunks of a thread at most.

A chunk is one stream of a thread: 2 x 960 x 576 bytes take 38 microseconds in chunks of 256 outputs, 47 of 64 and 80
of 16 (EPYC, 2026-11-28, two threads)."""

KERNELS = {
    (stored, dtype): CompiledKernel(f"few rows of {dtype} by weights of {stored}", partial(_build, stored, dtype))
    for dtype in DTYPES
    for stored in (dtype, torch.int8)
}
"""By the dtypes of the weights and of the rows."""


def project_few_rows(linears: tuple[nn.Module, ...], x: Tensor) -> list[Tensor] | None:
    """What each of the linear layers gives for `x` [B, L, in], [B, L, out]; None where they are better called.

    Sums are in float32 and rounded once, with the bias. The weights are of one dtype, with as many scales.
    """
    if torch.is_grad_enabled() or x.ndim != 3 or x.dtype not in DTYPES or type(x) is not Tensor or is_traced(x):
        return None
    if not 0 < x.shape[0] * x.shape[1] <= tuning.active.max_few_rows or not use_compiled(x):
        return None
    if torch.is_autocast_enabled("cpu") or has_global_hooks():
        return None
    weights = []
    for linear in linears:
        weight = linear_weight(linear, x.dtype) if type(linear) is nn.Linear else None
        if weight is None or weight.numbers.shape[1] != x.shape[2]:
            return None
        weights.append(weight)
    first = weights[0]
    for weight in weights[1:]:
        if weight.numbers.dtype is not first.numbers.dtype or weight.groups != first.groups:
            return None
    return _run(weights, x.contiguous())


def _run(weights: list[LinearWeight], x: Tensor) -> list[Tensor]:
    batch, length, width = x.shape
    outs, outputs = [], 0
    fields: list[int] = []
    for weight in weights:
        numbers, scales, zero_points, bias = weight
        its_outputs = numbers.shape[0]
        out = torch.empty((batch, length, its_outputs), dtype=x.dtype)
        outs.append(out)
        fields += (
            out.data_ptr(),
            numbers.data_ptr(),
            0 if scales is None else scales.data_ptr(),
            0 if zero_points is None else zero_points.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            its_outputs,
        )
        outputs += its_outputs
    first = weights[0]
    size = outputs * width * first.numbers.itemsize
    threads = usable_threads() if size >= tuning.active.min_parallel_bytes else 1
    # Several for each thread where there is enough for it, so that none waits for one that began late.
    chunks = threads * min(max(size // (threads * CHUNK_BYTES), 1), MOST_CHUNKS)
    per_chunk = -(-outputs // chunks)
    sizes = batch * length, width, per_chunk, first.groups, len(weights), 0
    KERNELS[first.numbers.dtype, x.dtype](threads, (0, x.data_ptr(), *sizes, *fields))
    return outs
