"""Tiles of a product of rows by weights: four rows by four outputs, whose sums stay in registers.

A number of a row or of a weight is read once for four products, so arithmetic is the limit and not the loads. Weights
that are not float32 become so once for all rows, in a block that stays in the core's cache.
"""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..attention_layout import BFLOAT16, FLOAT16, FLOAT32, INT8
from .attention.products import phases_summed
from .attention.vectors import ADDRESS, AS_WRITTEN, BYTES, LANES, VECTOR, WHOLE, Code, counted
from .pointers import prefetch

SIDE = 4
"""Rows of a tile, and its outputs."""


_KINDS = {types.float32: FLOAT32, types.uint16: BFLOAT16, types.int16: FLOAT16, types.int8: INT8}
"""What an array of weights contains, by the type of its numbers."""


@intrinsic
def upcast(_context: Any, weight: Any, _first: Any, _stride: Any, _outputs: Any, _size: Any, _target: Any) -> Any:
    """A run of `size` numbers, a multiple of `LANES`, of each of some rows of weights, as float32 [outputs, size].

    `first`: the address of the first row's run in `weight`; `stride`: bytes from row to row.
    """
    kind = _KINDS[weight.dtype]

    def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        _, first, stride, outputs, size, target = given
        code = Code(builder)
        vectors = builder.sdiv(size, ir.Constant(WHOLE, LANES))
        with counted(builder, outputs) as output:
            begin = builder.add(first, builder.mul(output.index, stride))
            to = code.at(target, builder.mul(output.index, vectors), 4 * LANES)
            with counted(builder, vectors) as vector:
                numbers = code.load_stored(code.at(begin, vector.index, BYTES[kind] * LANES), kind)
                code.store(numbers, code.at(to, vector.index, 4 * LANES))
        return context.get_dummy_value()

    return types.void(weight, *[ADDRESS] * 5), generate


@intrinsic
def _tile(_context: Any, _weights: Any, _stride: Any, _rows: Any, _size: Any, _sums: Any) -> Any:
    """Products of four rows and four rows of weights, `size` float32 numbers each, a multiple of `LANES`.

    `weights`: the address of the first, and the bytes from one to the next; `rows`: four addresses. `sums` [4, 4] takes
    those of the first output first.
    """

    def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        weights, stride, rows, size, sums = given
        code = Code(builder)
        weights = [builder.add(weights, builder.mul(stride, ir.Constant(WHOLE, output))) for output in range(SIDE)]
        rows = cgutils.unpack_tuple(builder, rows, SIDE)
        totals = [cgutils.alloca_once(builder, VECTOR) for _ in range(SIDE * SIDE)]
        for total in totals:
            builder.store(code.number(0.0), total)
        with counted(builder, builder.sdiv(size, ir.Constant(WHOLE, LANES))) as loop:
            x = [code.load(code.at(row, loop.index, 4 * LANES)) for row in rows]
            for output, weight in enumerate(weights):
                numbers = code.load(code.at(weight, loop.index, 4 * LANES))
                for row in range(SIDE):
                    total = totals[output * SIDE + row]
                    builder.store(code.fused(numbers, x[row], builder.load(total)), total)
        labelled = [(builder.load(total), [(number, 0)] * LANES) for number, total in enumerate(totals)]
        for number, (vector, labels) in enumerate(phases_summed(code, labelled, LANES)):
            order = [labels.index((number * LANES + lane, 0)) for lane in range(LANES)]
            code.store(code.shuffled(vector, vector, order), code.at(sums, number, 4 * LANES))
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, types.UniTuple(ADDRESS, SIDE), ADDRESS, ADDRESS), generate


@njit(**AS_WRITTEN)
def tiles(
    sums: int,
    weights: tuple[int, int],
    rows: tuple[int, int, int, int],
    size: int,
    outputs: int,
    ahead: tuple[int, int],
) -> None:
    """Sums [outputs, 4] of four rows at these addresses by some rows of weights; outputs a multiple of four.

    `ahead`: what is asked for meanwhile, an address and the bytes of each tile.
    """
    (address, stride), (later, share) = weights, ahead
    for output in range(0, outputs, SIDE):
        prefetch(later + output // SIDE * share, share)
        _tile(address + output * stride, stride, rows, size, sums + 4 * SIDE * output)
