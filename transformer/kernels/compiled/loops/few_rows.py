"""Few rows times matrices: up to 64 rows of tokens by weights [out, in], at the speed at which weights are read.

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
from .attention.vectors import LANES
from .dtypes import STORED, as_float, store
from .linear_tiles import SIDE, tiles, upcast
from .pointers import LOOP, depends_on, next_chunk, pointer_at, prefetch

BLOCK_BYTES = 1 << 16
"""Bytes of weights that are read again for rows after the fourth, from the core's own cache: 8 rows by 3,072 x 1,024 in
bfloat16 take 800 instead of 1,120 microseconds, 1,440 instead of 1,515 in float32 (EPYC with AVX2, two threads)."""

TILED_BYTES = 1 << 17
"""Bytes of such weights as float32, which tiles of rows read from there: 16 rows by 1,024 x 1,024 in bfloat16 take 770
microseconds instead of 940 with half as much (Intel Xeon with 2 MB a core, one thread of a busy machine)."""

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
def _chunk(weight: Any, x: Any, scaling: Any, sizes: Any, outputs: Any, totals: Any, copy: Any) -> None:
    """Some outputs of all rows into `totals` [rows, outputs], in float32; after them there is room for four more.

    `copy` takes a group of their weights as float32, if it is not empty.
    """
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
        in_tiles = later = share = 0
        if len(copy):
            in_tiles = number // SIDE * SIDE
            item = weight.itemsize
            first_run = weight.ctypes.data + run[0] * item
            upcast(weight, first_run, width * item, in_tiles, each, copy.ctypes.data)
            # The next weights, a share of them with each tile.
            later = first_run + number * width * item
            share = in_tiles * each * item // (in_tiles // SIDE * ((rows + 3) // 4)) if in_tiles else 0
        for row in range(0, rows, 4):
            # Rows after the last one are the last one again.
            second, third, fourth = min(row + 1, rows - 1), min(row + 2, rows - 1), min(row + 3, rows - 1)
            four = (
                x[row * width + low :],
                x[second * width + low :],
                x[third * width + low :],
                x[fourth * width + low :],
            )
            if in_tiles:
                at = four[0].ctypes.data, four[1].ctypes.data, four[2].ctypes.data, four[3].ctypes.data
                tiles(sums.ctypes.data, (copy.ctypes.data, 4 * each), at, each, in_tiles, (later, share))
                later += in_tiles // SIDE * share
            if in_tiles < number:
                _four_rows(sums[4 * in_tiles :], weight, four, (run[0] + in_tiles * width, width, each))
            for i in range(min(4, rows - row)):
                total, part = totals[(row + i) * number : (row + i + 1) * number], (row + i) * width + low
                _add_scaled(total, sums[i:], x[part : part + each], scaling, (first, groups, 4))


def build(weight_dtype: torch.dtype, dtype: torch.dtype) -> Any:
    """The kernel for weights of one dtype, and rows, biases and results of another."""
    stored, given, stamp = STORED[weight_dtype], STORED[dtype], sources_stamp()
    stored_bytes = weight_dtype.itemsize
    tiled = weight_dtype is not torch.float32 and LANES == 16

    def kernel(numbers: Any) -> None:
        depends_on(stamp)
        header = carray(numbers, layouts.FEW_ROWS_HEADER)
        rows, width, per_chunk, groups, weights = header[2], header[3], header[4], header[5], header[6]
        chunk = next_chunk(numbers)
        rounded = carray(pointer_at(header[1], given), rows * width)
        x, totals = np.empty(rows * width, np.float32), np.empty((rows + 4) * per_chunk, np.float32)
        each = width // groups
        room = TILED_BYTES // 4 // each // SIDE * SIDE * each if tiled and rows > 4 and each % LANES == 0 else 0
        copy = np.empty(room, np.float32)
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
                some = max(min(some, room // each if room else BLOCK_BYTES // (width * stored_bytes)), 1)
            for low in range(begin, end, some):
                high = min(low + some, end)
                _chunk(weight, x, scaling, (rows, width, groups), (low, high), totals, copy)
                for row in range(rows):
                    for output in range(low, high):
                        total = totals[row * (high - low) + output - low]
                        if fields[place + 4] != 0:
                            total += as_float(bias[output])
                        store(out, row * size + output, total)
            chunk = next_chunk(numbers)

    return compiled_callback(kernel, f"few_rows_{weight_dtype}_{dtype}".replace("torch.", ""))
