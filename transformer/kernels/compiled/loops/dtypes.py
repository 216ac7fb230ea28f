"""Dtypes in compiled kernels: stored numbers as float32, and float32 rounded to what is stored.

numba has no 16-bit floats: bfloat16 is read as uint16 and float16 as int16, by whose types the functions here tell
them apart. Everything is computed in float32.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

STORED = {
    torch.float32: types.float32,
    torch.bfloat16: types.uint16,
    torch.float16: types.int16,
    torch.int8: types.int8,
}
"""The type in which a kernel reads each dtype."""


@intrinsic
def _half_as_float(_context: Any, _bits: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return builder.fpext(builder.bitcast(given[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic
def _float_as_half(_context: Any, _number: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return builder.bitcast(builder.fptrunc(given[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


@intrinsic
def bits_as_float(_context: Any, _bits: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return builder.bitcast(given[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def float_as_bits(_context: Any, _number: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return builder.bitcast(given[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def as_float(stored: Any) -> float:
    """A stored number as float32, exactly; within kernels alone."""
    raise NotImplementedError


def store(array: Any, index: int, number: float) -> None:
    """Rounds a float32 to the nearest number of the array's dtype, ties to even; within kernels alone."""
    raise NotImplementedError


@overload(as_float, strict=False)
def _as_float(stored: Any) -> Callable[[Any], float]:
    if stored == types.uint16:
        return lambda stored: bits_as_float(np.uint32(stored) << np.uint32(16))
    if stored == types.int16:
        return lambda stored: _half_as_float(stored)
    return lambda stored: np.float32(stored)


@overload(store, strict=False)
def _store(array: Any, index: Any, number: Any) -> Callable[[Any, int, float], None]:
    if array.dtype == types.uint16:

        def store_bfloat16(array: Any, index: int, number: float) -> None:
            bits = float_as_bits(number)
            if number != number:
                # Rounding could carry a NaN over into infinity.
                array[index] = np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
            else:
                rounding = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
                array[index] = np.uint16((bits + rounding) >> np.uint32(16))

        return store_bfloat16
    if array.dtype == types.int16:

        def store_float16(array: Any, index: int, number: float) -> None:
            array[index] = _float_as_half(number)

        return store_float16

    def store_float32(array: Any, index: int, number: float) -> None:
        array[index] = number

    return store_float32
