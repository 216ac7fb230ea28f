"""Online softmax of compiled attention: scores of one block of keys to weights, with soft cap and biases of distances.

The scores of P rows stand as float32 [keys, P], so that a lane belongs to the row of its number modulo P in every
vector. The state of a row, in its lanes, is the largest score so far, the sum of the weights in each lane, and the
factor by which everything before this block shrinks.
"""

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vectors import ADDRESS, FLOAT, LANES, VECTOR, WHOLE, Code, counted

STATE_BYTES = 3 * 4 * LANES
"""Largest scores, sums and factors of the rows of one vector."""

SUMS, FACTORS = 4 * LANES, 8 * LANES
"""Where sums and factors stand in it, in bytes."""


def _vectors(builder: Any, count: Any, rows: int) -> Any:
    return builder.sdiv(builder.mul(count, ir.Constant(WHOLE, rows)), ir.Constant(WHOLE, LANES))


def softmax_of(rows: int) -> Any:
    """Turns scores [count, rows] into weights, and brings the state of the rows up to date: `(scores, count, state)`.

    A score of -inf gives a weight of 0. NaN, and infinity as the largest score, give NaN to the whole row. `count` is a
    multiple of `LANES`.
    """
    # Each result waits for the one before: several at once do not.
    at_once = min(rows, 4)

    @intrinsic
    def softmax(_context: Any, _scores: Any, _count: Any, _state: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
            scores, count, state = given
            code, vectors = Code(builder), _vectors(builder, count, rows)
            before = code.load(state)
            tops = [cgutils.alloca_once_value(builder, before) for _ in range(at_once)]
            with counted(builder, builder.sdiv(vectors, ir.Constant(WHOLE, at_once))) as loop:
                place = code.at(scores, loop.index, 4 * LANES * at_once)
                for number, largest in enumerate(tops):
                    score = code.load(code.at(place, number, 4 * LANES))
                    builder.store(code.maximum(builder.load(largest), score), largest)
            top = builder.load(tops[0])
            for largest in tops[1:]:
                top = code.maximum(top, builder.load(largest))
            step = rows
            while step < LANES:
                turned = code.shuffled(top, top, [(lane + step) % LANES for lane in range(LANES)])
                top, step = code.maximum(top, turned), 2 * step
            code.store(top, state)
            # Where every score so far is -inf there is no difference to take.
            nothing = builder.fcmp_ordered("==", top, code.number(-math.inf))
            top = builder.select(nothing, code.number(0.0), top)
            factor = code.exp(builder.fsub(before, top))
            code.store(factor, builder.add(state, ir.Constant(WHOLE, FACTORS)))
            sums = builder.add(state, ir.Constant(WHOLE, SUMS))
            totals = [cgutils.alloca_once_value(builder, code.number(0.0)) for _ in range(at_once)]
            with counted(builder, builder.sdiv(vectors, ir.Constant(WHOLE, at_once))) as loop:
                first = code.at(scores, loop.index, 4 * LANES * at_once)
                for number, total in enumerate(totals):
                    place = code.at(first, number, 4 * LANES)
                    weight = code.exp(builder.fsub(code.load(place), top))
                    code.store(weight, place)
                    builder.store(code.sum(builder.load(total), weight), total)
            total = builder.load(totals[0])
            for other in totals[1:]:
                total = code.sum(total, builder.load(other))
            code.store(code.fused(code.load(sums), factor, total), sums)
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 3), generate

    return softmax


@intrinsic
def cap_scores(_context: Any, _scores: Any, _vectors: Any, _cap: Any) -> Any:
    """`cap * tanh(score / cap)` of so many vectors of scores: `(scores, vectors, cap)`."""

    def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        scores, vectors, cap = given
        code, one = Code(builder), ir.VectorType(FLOAT, 1)
        cap = builder.insert_element(ir.Constant(one, ir.Undefined), cap, ir.Constant(ir.IntType(32), 0))
        cap = code.repeated(cap)
        with counted(builder, vectors) as vector:
            place = code.at(scores, vector.index, 4 * LANES)
            capped = code.tanh(builder.fdiv(code.load(place), cap))
            code.store(builder.fmul(capped, cap), place)
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, types.float32), generate


def scale_of(rows: int) -> Any:
    """Multiplies scores or weights [count, rows] by a number for each key: `(scores, count, scales)`."""
    phases = LANES // rows

    @intrinsic
    def scale(_context: Any, _scores: Any, _count: Any, _scales: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
            scores, count, scales = given
            code, kind = Code(builder), ir.VectorType(FLOAT, phases)
            with counted(builder, _vectors(builder, count, rows)) as vector:
                place = code.at(scores, vector.index, 4 * LANES)
                its = code.load(code.at(scales, vector.index, 4 * phases), kind)
                by = code.shuffled(its, its, [lane // rows for lane in range(LANES)])
                code.store(builder.fmul(code.load(place), by), place)
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 3), generate

    return scale


def slope_of(rows: int) -> Any:
    """Adds slopes times the sizes of distances to scores [count, rows]: `(scores, count, slopes, distances)`.

    `slopes` and `distances` float32 [LANES]: of each lane's row, and from its query to its key in the first vector.
    """
    phases = LANES // rows

    @intrinsic
    def slope(_context: Any, _scores: Any, _count: Any, _slopes: Any, _distances: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
            scores, count, slopes, distances = given
            code = Code(builder)
            slopes = code.load(slopes)
            distance = cgutils.alloca_once_value(builder, code.load(distances, VECTOR))
            with counted(builder, _vectors(builder, count, rows)) as vector:
                place, now = code.at(scores, vector.index, 4 * LANES), builder.load(distance)
                ahead = builder.fcmp_ordered("<", now, code.number(0.0))
                size = builder.select(ahead, builder.fneg(now), now)
                code.store(builder.fadd(code.load(place), builder.fmul(slopes, size)), place)
                builder.store(builder.fsub(now, code.number(float(phases))), distance)
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 4), generate

    return slope
