"""Rows of numbers in compiled attention: keys and values as float32 with padding, queries in lanes, results rounded."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ...attention_layout import FLOAT32
from .records import row_of
from .vectors import ADDRESS, BYTES, FLOAT, INT, LANES, VECTOR, WHOLE, Code, counted


def _whole(x: int) -> Any:
    return ir.Constant(WHOLE, x)


def copy_of(kind: int) -> Any:
    """Copies rows of a kind of numbers or records as float32: `(source, stride, count, width, target)`.

    `count` rows of `width` numbers, `stride` bytes apart, become contiguous rows that are padded to a multiple of
    `LANES` numbers, with finite ones or with NaN where the row has some; zeros fill the number of rows up to a multiple
    of `LANES`.
    """
    write_row = row_of(kind)

    @intrinsic
    def copy(_context: Any, _source: Any, _stride: Any, _count: Any, _width: Any, _target: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
            source, stride, count, width, target = given
            code, lanes = Code(builder), _whole(LANES)
            padded = builder.sdiv(builder.add(width, _whole(LANES - 1)), lanes)
            with counted(builder, count) as row:
                begin = builder.add(source, builder.mul(row.index, stride))
                write_row(code, begin, width, code.at(target, builder.mul(row.index, padded), 4 * LANES))
            filled = builder.mul(builder.sdiv(builder.add(count, _whole(LANES - 1)), lanes), lanes)
            to = code.at(target, builder.mul(count, padded), 4 * LANES)
            with counted(builder, builder.mul(builder.sub(filled, count), padded)) as vector:
                code.store(code.number(0.0), code.at(to, vector.index, 4 * LANES))
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 5), generate

    return copy


def arrange_of(rows: int) -> Any:
    """Puts one query row into the lanes that `scores_of(rows)` reads: `(source, width, target)`.

    `source` has `width` words, of any content; `target` is the first word of the row in [words / phases, rows, phases].
    """
    phases = LANES // rows
    kind = ir.VectorType(INT, phases)

    @intrinsic
    def arrange(_context: Any, _source: Any, _width: Any, _target: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
            source, width, target = given
            code = Code(builder)
            with counted(builder, builder.sdiv(width, _whole(phases))) as step:
                words = code.load(code.at(source, step.index, 4 * phases), kind)
                code.store(words, code.at(target, step.index, 4 * LANES))
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 3), generate

    return arrange


def write_of(dtype: int) -> Any:
    """Writes one row of results, rounded to a float dtype: `(source, width, factor, target)`."""

    @intrinsic
    def write(_context: Any, _source: Any, _width: Any, _factor: Any, _target: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
            source, width, factor, target = given
            code, one = Code(builder), ir.VectorType(FLOAT, 1)
            factor = builder.insert_element(ir.Constant(one, ir.Undefined), factor, ir.Constant(INT, 0))
            vectors = builder.sdiv(width, _whole(LANES))
            with counted(builder, vectors) as vector:
                numbers = code.load(code.at(source, vector.index, 4 * LANES))
                scaled = builder.fmul(numbers, code.repeated(factor))
                code.store_rounded(scaled, code.at(target, vector.index, BYTES[dtype] * LANES), dtype)
            begin = builder.mul(vectors, _whole(LANES))
            with counted(builder, builder.sub(width, begin)) as number:
                index = builder.add(begin, number.index)
                scaled = builder.fmul(code.load(code.at(source, index, 4), one), factor)
                code.store_rounded(scaled, code.at(target, index, BYTES[dtype]), dtype)
            return context.get_dummy_value()

        return types.void(ADDRESS, ADDRESS, types.float32, ADDRESS), generate

    return write


@intrinsic
def fill(_context: Any, _target: Any, _vectors: Any, _value: Any) -> Any:
    """Writes one number into all lanes of so many vectors: `(target, vectors, value)`."""

    def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        target, vectors, value = given
        code = Code(builder)
        kind = ir.VectorType(FLOAT, 1)
        one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(INT, 0))
        with counted(builder, vectors) as vector:
            code.store(code.repeated(one), code.at(target, vector.index, 4 * LANES))
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, types.float32), generate


@intrinsic
def add_row(_context: Any, _source: Any, _vectors: Any, _factor: Any, _target: Any) -> Any:
    """Adds `factor` times a row of float32 numbers to another: `(source, vectors, factor, target)`."""

    def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        source, vectors, factor, target = given
        code = Code(builder)
        kind = ir.VectorType(FLOAT, 1)
        factor = code.repeated(builder.insert_element(ir.Constant(kind, ir.Undefined), factor, ir.Constant(INT, 0)))
        with counted(builder, vectors) as vector:
            place = code.at(target, vector.index, 4 * LANES)
            numbers = code.load_stored(code.at(source, vector.index, 4 * LANES), FLOAT32)
            code.store(code.fused(factor, numbers, code.load(place, VECTOR)), place)
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, types.float32, ADDRESS), generate
