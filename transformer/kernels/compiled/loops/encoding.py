"""Records of codecs made from new keys and values, both in one pass: the same bytes as `transformer/codecs/` makes.

A chunk is a run of tokens. Functions that round have no relaxed arithmetic.
"""

from typing import Any

import numpy as np
import torch
from numba import carray, njit, types

from ....codecs.int4 import GROUP, HEADER_BYTES
from ....codecs.scaled import SCALE_BYTES
from ..attention_layout import BFLOAT16, FLOAT8, FLOAT16, FLOAT32, INT4, INT8
from ..kernel import compiled_callback, sources_stamp
from ..layouts import ENCODING_FIELDS, ENCODING_HEADER
from .dtypes import STORED, as_float, bits_as_float, float_as_bits, store
from .pointers import depends_on, next_chunk, pointer_at

_EXACT: dict[str, Any] = {"error_model": "numpy", "fastmath": False}

_SIZE, _INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
"""Bits of the size of a float32 number, which compare as sizes do, NaN last; and of infinity."""

_LEAST_NORMAL8 = np.uint32(121 << 23)
"""2 ** -6 as bits of float32: below, numbers of float8 are multiples of 2 ** -9."""

_BIAS8 = np.uint32((120 << 23) - 0x7FFFF)
"""Difference of the exponents' biases (127 and 7) as bits of float32, less 0x7FFFF. The last bit of float8's mantissa
is bit 20 of float32, and 0x7FFFF is one less than half of that unit: subtracting this adds almost half a unit."""

_MOST4 = np.float32(15.0)


@njit(**_EXACT)
def _scale(numbers: Any, most: Any) -> Any:
    """The largest size, divided by `most`."""
    top = np.uint32(0)
    for k in range(len(numbers)):
        top = max(top, float_as_bits(numbers[k]) & _SIZE)
    return bits_as_float(top) / most


@njit(**_EXACT)
def _int8(numbers: Any, record: Any) -> None:
    most = np.float32(127.0)
    scale = _scale(numbers, most)
    record[:SCALE_BYTES].view(np.float32)[0] = scale
    codes = record[SCALE_BYTES:].view(np.int8)
    by = np.float32(1.0) if scale == 0 else scale
    for k in range(len(numbers)):
        code = np.rint(numbers[k] / by)
        code = most if code > most else -most if code < -most else code
        codes[k] = np.int8(np.int32(code if code == code else np.float32(0.0)))
    codes[len(numbers) :] = 0


@njit(**_EXACT)
def _float8(numbers: Any, record: Any) -> None:
    most = np.float32(448.0)
    scale = _scale(numbers, most)
    record[:SCALE_BYTES].view(np.float32)[0] = scale
    codes = record[SCALE_BYTES:]
    by = np.float32(1.0) if scale == 0 else scale
    # The numbers of float32 from here on are as far apart as those of float8 below its normal ones.
    shift = np.float32(2.0**14)
    for k in range(len(numbers)):
        bits = float_as_bits(numbers[k] / by)
        size = bits & _SIZE
        small = float_as_bits(bits_as_float(size) + shift) - float_as_bits(shift)
        # Dropping 20 bits rounds down; with almost half a unit added it rounds to the nearest, and ties down. The last
        # bit that stays is added too, which makes it a whole half where that bit is odd: ties then go up, to even.
        normal = (size + ((size >> np.uint32(20)) & np.uint32(1)) - _BIAS8) >> np.uint32(20)
        code = small if size < _LEAST_NORMAL8 else min(normal, np.uint32(0x7E))
        code = np.uint32(0x7F) if size > _INFINITY else code
        codes[k] = np.uint8(code | ((bits >> np.uint32(24)) & np.uint32(0x80)))
    codes[len(numbers) :] = 0


@njit(**_EXACT)
def _ordered(number: Any) -> Any:
    """A whole number that compares as the float32 does, NaN beyond infinity."""
    bits = np.int32(float_as_bits(number))
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit(**_EXACT)
def _number(ordered: Any) -> Any:
    bits = ordered ^ ((ordered >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return bits_as_float(np.uint32(bits))


@njit(**_EXACT)
def _int4(numbers: Any, record: Any) -> None:
    """`numbers` are filled up to whole groups."""
    groups, half = len(numbers) // GROUP, GROUP // 2
    headers, infinity = record[: HEADER_BYTES * groups].view(np.uint16), np.int32(_INFINITY)
    codes = np.empty(GROUP, np.uint8)
    for group in range(groups):
        its = numbers[group * GROUP : (group + 1) * GROUP]
        low = high = _ordered(its[0])
        for k in range(GROUP):
            ordered = _ordered(its[k])
            low, high = min(low, ordered), max(high, ordered)
        nan = high > infinity or low < ~infinity
        least = np.float32(np.nan) if nan else _number(low)
        store(headers, 2 * group, least)
        least = as_float(headers[2 * group])
        store(headers, 2 * group + 1, (_number(high) - least) / _MOST4)
        step = as_float(headers[2 * group + 1])
        by = np.float32(1.0) if step == 0 else step
        for k in range(GROUP):
            code = np.rint((its[k] - least) / by)
            code = _MOST4 if code > _MOST4 else code if code > 0 else np.float32(0.0)
            codes[k] = np.uint8(np.int32(code))
        halves = record[HEADER_BYTES * groups + half * group :]
        for k in range(half):
            halves[k] = codes[k] | (codes[half + k] << np.uint8(4))


@njit(**_EXACT)
def _encode(kind: int, numbers: Any, width: int, record: Any) -> None:
    """The record of the first `width` numbers, which are filled up to whole groups of channels."""
    if kind == INT8:
        _int8(numbers[:width], record)
    elif kind == FLOAT8:
        _float8(numbers[:width], record)
    elif kind == INT4:
        _int4(numbers, record)
    elif kind == FLOAT32:
        record.view(np.float32)[:] = numbers[:width]
    elif kind == BFLOAT16:
        halves = record.view(np.uint16)
        for k in range(width):
            store(halves, k, numbers[k])
    elif kind == FLOAT16:
        shorts = record.view(np.int16)
        for k in range(width):
            store(shorts, k, numbers[k])


def build(dtype: torch.dtype) -> Any:
    """The kernel for keys and values of one dtype."""
    given, size, stamp = STORED[dtype], dtype.itemsize, sources_stamp()

    def kernel(numbers: Any) -> None:
        depends_on(stamp)
        header = carray(numbers, ENCODING_HEADER + 2 * ENCODING_FIELDS)
        length, tokens, per_chunk, width = header[1], header[2], header[3], header[4]
        wide = np.empty((width + GROUP - 1) // GROUP * GROUP, np.float32)
        begin = next_chunk(numbers) * per_chunk
        while begin < tokens:
            for token in range(begin, min(begin + per_chunk, tokens)):
                row, at = token // length, token % length
                for field in range(ENCODING_HEADER, len(header), ENCODING_FIELDS):
                    kind, record_bytes, heads = header[field + 2], header[field + 3], header[field + 4]
                    for head in range(heads):
                        offset = row * header[field + 5] + head * header[field + 6] + at * header[field + 7]
                        vector = carray(pointer_at(header[field] + size * offset, given), width)
                        for k in range(width):
                            wide[k] = as_float(vector[k])
                        wide[width:] = wide[width - 1]
                        place = record_bytes * ((row * heads + head) * length + at)
                        record = carray(pointer_at(header[field + 1] + place, types.uint8), record_bytes)
                        _encode(kind, wide, width, record)
            begin = next_chunk(numbers) * per_chunk

    return compiled_callback(kernel, f"encoding_{dtype}".replace("torch.", ""))
