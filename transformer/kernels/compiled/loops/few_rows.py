"""Few rows times matrices: one to eight rows of tokens by weights [out, in], at the speed at which weights are read.

A chunk is a run of outputs of one weight. Outputs are summed one after the other, so that each thread reads its weights
as one stream: two streams side by side are read at half the speed. Four rows are summed at a time, and read the same
weights.
"""

from typing import Any

import numpy as np
import torch
from numba import carray, njit, types

from .. import layouts
from ..kernel import compiled_callback, sources_stamp
from .dtypes import STORED, as_float, store
from .pointers import LOOP, depends_on, next_chunk, pointer_at, prefetch

BLOCK_BYTES = 1 << 16
"""Bytes of weights that are read again for rows after the fourth, from the core's own cache: 8 rows by 3,072 x 1,024 in
bfloat16 take 800 instead of 1,120 microseconds, 1,440 instead of 1,515 in float32 (EPYC with AVX2, two threads)."""


AHEAD = 1 << 12
"""Bytes that are asked for before they are multiplied: the processor's own prefetcher leaves a fifth of the bandwidth
of a large shared cache unused. A row of 576 x 576 float32 numbers from there is read at 22 instead of 17 GB/s, 18 by
PyTorch (Intel Xeon with 260 MB, one thread, 2026-11-28)."""


@njit(**LOOP)
def _one_row(sums: Any, weight: Any, x: Any, run: Any) -> None:
    """Sums of one run of numbers of `x` times that run of each of some rows of weights."""
    first, stride, size = run
    x, item = x[:size], weight.itemsize
    ahead = weight.ctypes.data + first * item + AHEAD
    for output in range(len(sums)):
        begin = first + output * stride
        prefetch(ahead + output * stride * item, size * item)
        numbers = weight[begin : begin + size]
        total = np.float32(0.0)
        for k in range(size):
            total += as_float(numbers[k]) * x[k]
        sums[output] = total


@njit(**LOOP)
def _four_rows(sums: Any, weight: Any, rows: Any, run: Any) -> None:
    """The same for four rows, each of which reads the weights once: `sums` [outputs, 4]."""
    (first, stride, size), (row_0, row_1, row_2, row_3) = run, rows
    row_0, row_1, row_2, row_3 = row_0[:size], row_1[:size], row_2[:size], row_3[:size]
    item = weight.itemsize
    ahead = weight.ctypes.data + first * item + AHEAD
    for output in range(len(sums) // 4):
        begin = first + output * stride
        prefetch(ahead + output * stride * item, size * item)
        numbers = weight[begin : begin + size]
        a = b = c = d = np.float32(0.0)
        for k in range(size):
            number = as_float(numbers[k])
            a += number * row_0[k]
            b += number * row_1[k]
            c += number * row_2[k]
            d += number * row_3[k]
        place = 4 * output
        sums[place], sums[place + 1], sums[place + 2], sums[place + 3] = a, b, c, d


@njit(**LOOP)
def _add_scaled(totals: Any, sums: Any, x: Any, scaling: Any, places: Any) -> None:
    """Adds sums of stored weights times one run of `x` as sums of what they stand for."""
    (scales, zeros, has_scales, has_zeros), (first, groups, step) = scaling, places
    numbers = np.float32(0.0)
    if has_zeros:
        for number in x:
            numbers += number
    for output in range(len(totals)):
        total, place = sums[output * step], first + output * groups
        if has_zeros and zeros[place] != 0:
            total -= np.float32(zeros[place]) * numbers
        totals[output] += total * scales[place] if has_scales else total


@njit(**LOOP)
def _chunk(weight: Any, x: Any, scaling: Any, sizes: Any, outputs: Any, totals: Any) -> None:
    """Some outputs of all rows into `totals` [rows, outputs], in float32; after them there is room for four more."""
    rows, width, groups = sizes
    begin, end = outputs
    each, number = width // groups, end - begin
    totals[: rows * number] = np.float32(0.0)
    sums = totals[rows * number : (rows + 4) * number]
    for group in range(groups):
        low = group * each
        run, first = (begin * width + low, width, each), begin * groups + group
        if rows == 1:
            _one_row(sums[:number], weight, x[low:], run)
            _add_scaled(totals[:number], sums, x[low : low + each], scaling, (first, groups, 1))
            continue
        for row in range(0, rows, 4):
            # Rows after the last one are the last one again.
            second, third, fourth = min(row + 1, rows - 1), min(row + 2, rows - 1), min(row + 3, rows - 1)
            four = (
                x[row * width + low :],
                x[second * width + low :],
                x[third * width + low :],
                x[fourth * width + low :],
            )
            _four_rows(sums, weight, four, run)
            for i in range(min(4, rows - row)):
                total, part = totals[(row + i) * number : (row + i + 1) * number], (row + i) * width + low
                _add_scaled(total, sums[i:], x[part : part + each], scaling, (first, groups, 4))


def build(weight_dtype: torch.dtype, dtype: torch.dtype) -> Any:
    """The kernel for weights of one dtype, and rows, biases and results of another."""
    stored, given, stamp = STORED[weight_dtype], STORED[dtype], sources_stamp()
    stored_bytes = weight_dtype.itemsize

    def kernel(numbers: Any) -> None:
        depends_on(stamp)
        header = carray(numbers, layouts.FEW_ROWS_HEADER)
        rows, width, per_chunk, groups, weights = header[2], header[3], header[4], header[5], header[6]
        chunk = next_chunk(numbers)
        rounded = carray(pointer_at(header[1], given), rows * width)
        x, totals = np.empty(rows * width, np.float32), np.empty((rows + 4) * per_chunk, np.float32)
        for k in range(rows * width):
            x[k] = as_float(rounded[k])
        fields = carray(numbers, layouts.FEW_ROWS_HEADER + weights * layouts.FEW_ROWS_FIELDS)
        before, place = 0, layouts.FEW_ROWS_HEADER
        while place < layouts.FEW_ROWS_HEADER + weights * layouts.FEW_ROWS_FIELDS:
            size = fields[place + 5]
            chunks = (size + per_chunk - 1) // per_chunk
            if chunk >= before + chunks:
                before += chunks
                place += layouts.FEW_ROWS_FIELDS
                continue
            weight = carray(pointer_at(fields[place + 1], stored), size * width)
            scales = carray(pointer_at(fields[place + 2], types.float32), size * groups)
            zeros = carray(pointer_at(fields[place + 3], types.int8), size * groups)
            bias = carray(pointer_at(fields[place + 4], given), size)
            out = carray(pointer_at(fields[place], given), rows * size)
            begin = (chunk - before) * per_chunk
            end = min(begin + per_chunk, size)
            scaling = (scales, zeros, fields[place + 2] != 0, fields[place + 3] != 0)
            some = end - begin
            if rows > 4:
                some = max(min(some, BLOCK_BYTES // (width * stored_bytes)), 1)
            for low in range(begin, end, some):
                high = min(low + some, end)
                _chunk(weight, x, scaling, (rows, width, groups), (low, high), totals)
                for row in range(rows):
                    for output in range(low, high):
                        total = totals[row * (high - low) + output - low]
                        if fields[place + 4] != 0:
                            total += as_float(bias[output])
                        store(out, row * size + output, total)
            chunk = next_chunk(numbers)

    return compiled_callback(kernel, f"few_rows_{weight_dtype}_{dtype}".replace("torch.", ""))
