"""Few rows times matrices by compiled kernels: one call for all weights that read the same rows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..plain import has_global_hooks
from . import tuning
from .compiled import FLOAT_DTYPES, CompiledKernel, built_by, layouts, may_compute, usable_threads
from .linear_weights import LinearWeight, linear_weight
from .private_operators import EMULATED_DTYPES, FUSED_HALF_DTYPES, ONEDNN_LINEAR

QUICK_FLOAT32 = ONEDNN_LINEAR and torch.backends.cpu.get_cpu_capability() != "AVX2"

FAST_DTYPES = FUSED_HALF_DTYPES | ({torch.float32} if QUICK_FLOAT32 else set())
"""Those for which this processor has a quick linear of several wide rows. With AVX2 alone 4 rows by 2,048 x 2,048
float32 weights take 2,950 microseconds by oneDNN and 1,548 compiled (EPYC, 2026-11-28, two threads)."""

CHUNK_BYTES, MOST_CHUNKS = 1 << 18, 8
"""Bytes of weights of a chunk at least, where each thread has one, and chunks of a thread at most.

A chunk is one stream of a thread: 2 x 960 x 576 bytes take 38 microseconds in chunks of 256 outputs, 47 of 64 and 80
of 16 (EPYC, 2026-11-28, two threads)."""

KERNELS = {
    (stored, dtype): CompiledKernel(
        f"few rows of {dtype} by weights of {stored}",
        built_by("few_rows", "build", stored, dtype),
        lengths=tuple(layouts.FEW_ROWS_HEADER + weights * layouts.FEW_ROWS_FIELDS for weights in (1, 2, 3)),
    )
    for dtype in FLOAT_DTYPES
    for stored in (dtype, torch.int8)
}
"""By the dtypes of the weights and of the rows."""


def project_few_rows(linears: Sequence[nn.Module | LinearWeight], x: Tensor) -> list[Tensor] | None:
    """What each of the linear layers gives for `x` [B, L, in], [B, L, out]; None where they are better called.

    Sums are in float32 and rounded once, with the bias. The weights are of one dtype, with as many scales. A
    `LinearWeight` in the place of a layer is a plain one of the dtype of `x`, on the CPU.
    """
    dtype, limits = x.dtype, tuning.active
    if dtype not in FLOAT_DTYPES or x.ndim != 3 or not may_compute(x) or has_global_hooks():
        return None
    batch, length, width = x.shape
    rows, outputs, stored, groups = batch * length, 0, None, 1
    if not 0 < rows <= limits.max_few_rows_int8:
        return None
    # What PyTorch multiplies at the processor's full rate. For float32 rows int8 weights are no such thing: torchao
    # forms all of them in float32 at every call.
    wide = rows > 1 and rows * width > limits.max_few_rows_numbers and dtype in FAST_DTYPES
    many = wide or rows > limits.max_few_rows
    float_by_torch = rows > limits.max_emulated_rows if dtype in EMULATED_DTYPES else many
    int8_by_torch = many and dtype is not torch.float32
    outs: list[Tensor] = []
    fields: list[int] = []
    for linear in linears:
        if type(linear) is nn.Linear:
            weight = linear_weight(linear, dtype)
        else:
            weight = linear if isinstance(linear, LinearWeight) else None
        if weight is None or (float_by_torch if weight.scales is None else int8_by_torch):
            return None
        numbers, scales, zero_points, bias = weight
        its_outputs, inputs = numbers.shape
        its_groups = 1 if scales is None else scales.numel() // its_outputs
        if inputs != width or (stored is not None and (numbers.dtype is not stored or its_groups != groups)):
            return None
        stored, groups, outputs = numbers.dtype, its_groups, outputs + its_outputs
        # Sizes one by one: a tuple of them takes twice as long.
        out = x.new_empty(batch, length, its_outputs)
        outs.append(out)
        fields += (
            out.data_ptr(),
            numbers.data_ptr(),
            0 if scales is None else scales.data_ptr(),
            0 if zero_points is None else zero_points.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            its_outputs,
        )
    if stored is None:
        return outs
    size = outputs * width * stored.itemsize
    threads = usable_threads() if size >= limits.min_parallel_bytes else 1
    # Several for each thread where there is enough for it, so that none waits for one that began late.
    chunks = threads * min(max(size // (threads * CHUNK_BYTES), 1), MOST_CHUNKS)
    per_chunk = -(-outputs // chunks)
    x = x.contiguous()
    sizes = rows, width, per_chunk, groups, len(linears), 0
    KERNELS[stored, dtype].run(threads, (0, x.data_ptr(), *sizes, *fields))
    return outs
