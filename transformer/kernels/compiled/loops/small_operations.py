"""RMS norm and rotation of heads, one pass over their tensors each: PyTorch takes four to ten operations.

A chunk is a run of rows of a norm, or of tokens of a rotation.
"""

from typing import Any

import numpy as np
import torch
from numba import carray, njit, types

from ..kernel import compiled_callback, sources_stamp
from ..layouts import NORM_NUMBERS, ROTATION_FIELDS, ROTATION_HEADER
from .dtypes import STORED, as_float, bits_as_float, store
from .pointers import LOOP, depends_on, next_chunk, pointer_at


@njit(**LOOP)
def _normalise(x: Any, weight: Any, out: Any, eps: Any, offset: Any) -> None:
    """One row `x` over its root mean square, times the weight."""
    total = np.float32(0.0)
    for k in range(len(x)):
        number = as_float(x[k])
        total += number * number
    scale = np.float32(1.0) / np.sqrt(total / np.float32(len(x)) + eps)
    for k in range(len(x)):
        store(out, k, as_float(x[k]) * scale * (as_float(weight[k]) + offset))


@njit(**LOOP)
def _rotate(x: Any, out: Any, cos: Any, sin: Any, interleaved: Any) -> None:
    """One head of one token: its first dimensions rotated, the others copied."""
    half = len(cos) // 2
    if interleaved:
        for k in range(half):
            a, b = as_float(x[2 * k]), as_float(x[2 * k + 1])
            store(out, 2 * k, a * cos[2 * k] + b * sin[2 * k])
            store(out, 2 * k + 1, b * cos[2 * k + 1] + a * sin[2 * k + 1])
    else:
        for k in range(half):
            a, b = as_float(x[k]), as_float(x[k + half])
            store(out, k, a * cos[k] + b * sin[k])
            store(out, k + half, b * cos[k + half] + a * sin[k + half])
    for k in range(len(cos), len(x)):
        out[k] = x[k]


def build_rms_norm(dtype: torch.dtype) -> Any:
    """The kernel for rows, a weight and results of one dtype."""
    stored, stamp = STORED[dtype], sources_stamp()

    def kernel(numbers: Any) -> None:
        depends_on(stamp)
        header = carray(numbers, NORM_NUMBERS)
        rows, width, per_chunk = header[4], header[5], header[6]
        x = carray(pointer_at(header[1], stored), rows * width)
        weight = carray(pointer_at(header[2], stored), width)
        out = carray(pointer_at(header[3], stored), rows * width)
        eps, offset = bits_as_float(np.uint32(header[7])), np.float32(header[8])
        begin = next_chunk(numbers) * per_chunk
        while begin < rows:
            for row in range(begin, min(begin + per_chunk, rows)):
                place = row * width
                _normalise(x[place : place + width], weight, out[place : place + width], eps, offset)
            begin = next_chunk(numbers) * per_chunk

    return compiled_callback(kernel, f"rms_norm_{dtype}".replace("torch.", ""))


def build_rotation(dtype: torch.dtype) -> Any:
    """The kernel for queries and keys of one dtype, by float32 cosines and sines."""
    stored, size, stamp = STORED[dtype], dtype.itemsize, sources_stamp()

    def kernel(numbers: Any) -> None:
        depends_on(stamp)
        header = carray(numbers, ROTATION_HEADER + 2 * ROTATION_FIELDS)
        by_row, by_token, batch, length, per_chunk = header[3], header[4], header[5], header[6], header[7]
        width, rotary_dim, interleaved = header[8], header[9], header[10] != 0
        begin = next_chunk(numbers) * per_chunk
        while begin < batch * length:
            for token in range(begin, min(begin + per_chunk, batch * length)):
                row, at = token // length, token % length
                place = 4 * (row * by_row + at * by_token)
                cos = carray(pointer_at(header[1] + place, types.float32), rotary_dim)
                sin = carray(pointer_at(header[2] + place, types.float32), rotary_dim)
                for field in range(ROTATION_HEADER, len(header), ROTATION_FIELDS):
                    first = row * header[field + 3] + at * header[field + 5]
                    for head in range(header[field + 2]):
                        place = size * (first + head * header[field + 4])
                        x = carray(pointer_at(header[field] + place, stored), width)
                        out = carray(pointer_at(header[field + 1] + place, stored), width)
                        _rotate(x, out, cos, sin, interleaved)
            begin = next_chunk(numbers) * per_chunk

    return compiled_callback(kernel, f"rotation_{dtype}".replace("torch.", ""))
