"""Records of codecs in compiled attention: rows as float32 numbers, and the scales of records that are read directly.

Where 8-bit numbers are multiplied as they are, their scale multiplies the score or the weight; a copy contains it.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit

from .....codecs.int4 import GROUP, HEADER_BYTES
from .....codecs.scaled import SCALE_BYTES
from ...attention_layout import FLOAT8, INT4, INT8
from .vectors import (
    AS_WRITTEN,
    BYTES,
    FLOAT,
    FLOAT8_UNIT,
    INT,
    INTS,
    LANES,
    VECTOR,
    WHOLE,
    Code,
    counted,
    read_float,
    write_float,
)

Row = Callable[[Code, Any, Any, Any], None]
"""Code for one row `(code, source, width, target)`: float32 numbers, padded to a multiple of `LANES`."""

_HALF = GROUP // 2


def _whole(x: int) -> Any:
    return ir.Constant(WHOLE, x)


def row_of(kind: int) -> Row:
    """The code that writes one row of a kind of numbers or records."""
    return _int4 if kind == INT4 else _numbers(kind)


def _numbers(kind: int) -> Row:
    """Numbers of a dtype, with zeros as padding; those of a record times its scale."""

    def write(code: Code, source: Any, width: Any, target: Any) -> None:
        builder, lanes, size = code.builder, _whole(LANES), BYTES[kind]
        vectors, rest = builder.sdiv(width, lanes), builder.srem(width, lanes)
        scale = None
        if kind in (INT8, FLOAT8):
            scale = code.load(source, ir.VectorType(FLOAT, 1))
            if kind == FLOAT8:
                scale = builder.fmul(scale, ir.Constant(scale.type, [FLOAT8_UNIT]))
            source = builder.add(source, _whole(SCALE_BYTES))

        def number(address: Any, count: int) -> Any:
            loaded = code.load_stored(address, kind, count)
            if scale is None:
                return loaded
            return builder.fmul(loaded, scale if count == 1 else code.repeated(scale))

        with counted(builder, vectors) as vector:
            loaded = number(code.at(source, vector.index, size * LANES), LANES)
            code.store(loaded, code.at(target, vector.index, 4 * LANES))
        with builder.if_then(builder.icmp_signed(">", rest, _whole(0)), likely=False):
            last, begin = code.at(target, vectors, 4 * LANES), code.at(source, vectors, size * LANES)
            code.store(code.number(0.0), last)
            with counted(builder, rest) as place:
                code.store(number(code.at(begin, place.index, size), 1), code.at(last, place.index, 4))

    return write


def _int4(code: Code, source: Any, width: Any, target: Any) -> None:
    """Groups of channels; what fills up the last one is the padding."""
    builder, per_group = code.builder, GROUP // LANES
    groups = builder.sdiv(builder.add(width, _whole(GROUP - 1)), _whole(GROUP))
    vectors = builder.sdiv(builder.add(width, _whole(LANES - 1)), _whole(LANES))
    halves = code.at(source, groups, HEADER_BYTES)

    def numbers(group: Any) -> list[Any]:
        header = code.repeated(code.load(code.at(source, group, HEADER_BYTES), ir.VectorType(INT, 1)))
        least = builder.bitcast(builder.shl(header, ir.Constant(INTS, [16] * LANES)), VECTOR)
        step = builder.bitcast(builder.and_(header, ir.Constant(INTS, [0xFFFF0000] * LANES)), VECTOR)
        begin, found = code.at(halves, group, _HALF), [[], []]  # type: tuple[Any, list[list[Any]]]
        for part in range(_HALF // LANES):
            stored = code.load(code.at(begin, part, LANES), ir.VectorType(ir.IntType(8), LANES), 1)
            both = builder.zext(stored, INTS)
            lower = builder.and_(both, ir.Constant(INTS, [15] * LANES))
            upper = builder.lshr(both, ir.Constant(INTS, [4] * LANES))
            for half, codes in zip(found, (lower, upper), strict=True):
                half.append(code.fused(builder.sitofp(codes, VECTOR), step, least))
        return found[0] + found[1]

    whole = builder.sdiv(vectors, _whole(per_group))
    with counted(builder, whole) as group:
        first = code.at(target, group.index, 4 * GROUP)
        for vector, its in enumerate(numbers(group.index)):
            code.store(its, code.at(first, vector, 4 * LANES))
    rest = builder.srem(vectors, _whole(per_group))
    with builder.if_then(builder.icmp_signed(">", rest, _whole(0)), likely=False):
        first = code.at(target, whole, 4 * GROUP)
        for vector, its in enumerate(numbers(whole)):
            with builder.if_then(builder.icmp_signed(">", rest, _whole(vector))):
                code.store(its, code.at(first, vector, 4 * LANES))


@njit(**AS_WRITTEN)
def gather_scales(records: int, stride: int, count: int, target: int) -> None:
    """The scales of `count` records of 8-bit numbers, side by side."""
    for key in range(count):
        write_float(target, key, read_float(records + key * stride, 0))
