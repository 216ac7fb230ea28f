"""Two products of attention as register-blocked code: queries times keys, and weights times values.

Scores: a vector contains P query rows side by side, each with as many dimensions as fit (its phases): 16 rows with one
dimension, 4 rows with 4, or 1 row with 16. A run of as many numbers of a key, repeated for every row, is multiplied by
it, so each key is read once for all rows. The phases are summed for several keys at a time, by shuffles.

Values: the sums of up to four rows and four vectors of dimensions stay in registers over all keys of a block.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ...attention_layout import BLOCK, FLOAT32
from .vectors import ADDRESS, BYTES, FLOAT, LANES, VECTOR, WHOLE, Code, counted

KEY_STRIDE, KEY_WIDTH, SCALE, QUERY_STRIDE, VALUE_STRIDE, WEIGHT_ROW, WEIGHT_KEY, SUM_STRIDE = range(8)
"""Numbers of a frame, which the products of one block share: bytes from key to key; words of a key that are multiplied;
the scale (float32); bytes from one vector of query rows to the next; bytes from value to value, from row to row and key
to key of weights, and from row to row of sums."""

FRAME_BYTES = 64

KEYS_AT_ONCE = {rows: max(LANES // rows, 8) for rows in (1, 4, LANES)}
"""Keys whose scores are in registers at once, by the rows of a vector."""

NEAR_KEYS = {rows: 8 if rows == LANES else 4 for rows in KEYS_AT_ONCE}
"""Keys that are read together, number by number: more streams than 4 leave a third of the memory's bandwidth unused
(EPYC, 2026-11-28: 22 instead of 32 GB/s with 16). Of 16 rows arithmetic is the limit."""

TILE_VECTORS = 4 if LANES == 16 else 2
"""Vectors of dimensions of a value whose sums are in registers at once."""

_Labelled = tuple[Any, list[tuple[int, int]]]
"""A vector, and for each lane the key and the row to whose score it belongs."""


def scores_of(rows: int, dtype: int = FLOAT32, *, pairs: bool = False, vectors: int = 1) -> Any:
    """Scores of P = `rows` query rows: `(frame, queries, keys, count, scores)`.

    `queries` [words / phases, rows, phases], `keys` [count, words] with `count` a multiple of `LANES`; gives `scores`
    float32 [count, rows], scaled. With `pairs` a word is two neighbouring bfloat16 numbers. Several `vectors` of
    queries, of `LANES` rows each, read each key together; their scores are `BLOCK` keys apart.
    """
    phases, at_once, near_keys, size = LANES // rows, KEYS_AT_ONCE[rows], NEAR_KEYS[rows], BYTES[dtype]

    @intrinsic
    def scores(_context: Any, _frame: Any, _queries: Any, _keys: Any, _count: Any, _scores: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
            frame, queries, keys, count, out = given
            code = Code(builder)
            stride, words = (code.load(code.at(frame, field, 8), WHOLE, 8) for field in (KEY_STRIDE, KEY_WIDTH))
            scale = code.repeated(code.load(code.at(frame, SCALE, 8), ir.VectorType(FLOAT, 1)))
            totals = [cgutils.alloca_once(builder, VECTOR) for _ in range(vectors * at_once)]
            places_of_queries = [queries]
            if vectors > 1:
                step = code.load(code.at(frame, QUERY_STRIDE, 8), WHOLE, 8)
                for _ in range(1, vectors):
                    places_of_queries.append(builder.add(places_of_queries[-1], step))
            steps = builder.sdiv(words, ir.Constant(WHOLE, phases))
            with counted(builder, builder.sdiv(count, ir.Constant(WHOLE, at_once))) as blocks:
                block = builder.mul(blocks.index, ir.Constant(WHOLE, at_once))
                places = [builder.add(keys, builder.mul(block, stride))]
                for _ in range(1, at_once):
                    places.append(builder.add(places[-1], stride))
                for total in totals:
                    builder.store(code.number(0.0), total)
                for first in range(0, at_once, near_keys):
                    near = list(enumerate(places))[first : first + near_keys]
                    with counted(builder, steps) as inner:
                        its = [code.load(code.at(each, inner.index, 4 * LANES)) for each in places_of_queries]
                        offset = builder.mul(inner.index, ir.Constant(WHOLE, size * phases))
                        for number, place in near:
                            key = code.repeated(code.load_stored(builder.add(place, offset), dtype, phases))
                            for query, total in zip(its, totals[number::at_once], strict=True):
                                before = builder.load(total)
                                after = code.dot_pairs(before, query, key) if pairs else code.fused(query, key, before)
                                builder.store(after, total)
                for vector in range(vectors):
                    labelled = [
                        (builder.load(total), [(key, lane // phases) for lane in range(LANES)])
                        for key, total in enumerate(totals[vector * at_once : (vector + 1) * at_once])
                    ]
                    begin = code.at(code.at(out, vector, 4 * BLOCK * LANES), block, 4 * rows)
                    for number, (summed, labels) in enumerate(phases_summed(code, labelled, phases)):
                        wanted = [(number * phases + lane // rows, lane % rows) for lane in range(LANES)]
                        order = [labels.index(label) for label in wanted]
                        ordered = summed if order == list(range(LANES)) else code.shuffled(summed, summed, order)
                        code.store(builder.fmul(ordered, scale), code.at(begin, number, 4 * LANES))
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 5), generate

    return scores


def phases_summed(code: Code, vectors: list[_Labelled], phases: int) -> list[_Labelled]:
    """The sums over the phases: neighbours in two vectors at a time, of lanes first and then of groups of four."""
    done = 1
    while done < phases:
        width = 1 if done < 4 else 4
        lanes = [[], []]  # type: list[list[int]]
        if width == 1:
            for group in range(0, LANES, 4):
                for other in (0, LANES):
                    lanes[0] += [other + group, other + group + 2]
                    lanes[1] += [other + group + 1, other + group + 3]
        else:
            for begin in range(0, 2 * LANES, 8):
                lanes[0] += range(begin, begin + 4)
                lanes[1] += range(begin + 4, begin + 8)
        summed = []
        for (x, its), (y, others) in zip(vectors[::2], vectors[1::2], strict=True):
            both = its + others
            total = code.sum(code.shuffled(x, y, lanes[0]), code.shuffled(x, y, lanes[1]))
            summed.append((total, [both[lane] for lane in lanes[0]]))
        vectors, done = summed, 2 * done
    return vectors


def weighted_sums_of(rows: int, vectors: int, dtype: int) -> Any:
    """Sums of values by weights for a tile: `(frame, weights, values, count, sums, factors)`.

    For each of `rows` rows: `sums = factor * sums + weights @ values`, over `count` (even) values of a stored dtype and
    `vectors` vectors of their dimensions. `factors` float32 [rows].
    """
    # One row has too few sums to fill the pipeline: every other value goes into a second set.
    sets = 2 if rows == 1 else 1

    @intrinsic
    def weighted(
        _context: Any, _frame: Any, _weights: Any, _values: Any, _count: Any, _sums: Any, _factors: Any
    ) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
            frame, weights, values, count, sums, factors = given
            code = Code(builder)
            fields = VALUE_STRIDE, WEIGHT_ROW, WEIGHT_KEY, SUM_STRIDE
            stride, row, key, next_sums = (code.load(code.at(frame, field, 8), WHOLE, 8) for field in fields)
            tiles = [[cgutils.alloca_once(builder, VECTOR) for _ in range(rows * vectors)] for _ in range(sets)]
            cells = [(r, v, r * vectors + v) for r in range(rows) for v in range(vectors)]

            def place(r: int, v: int) -> Any:
                return code.at(builder.add(sums, builder.mul(next_sums, ir.Constant(WHOLE, r))), v, 4 * LANES)

            one = ir.VectorType(FLOAT, 1)
            for tile in tiles:
                for total in tile:
                    builder.store(code.number(0.0), total)
            with counted(builder, builder.sdiv(count, ir.Constant(WHOLE, sets))) as loop:
                for number, tile in enumerate(tiles):
                    index = builder.add(builder.mul(loop.index, ir.Constant(WHOLE, sets)), ir.Constant(WHOLE, number))
                    value = builder.add(values, builder.mul(index, stride))
                    weight = builder.add(weights, builder.mul(index, key))
                    loaded = [code.load_stored(code.at(value, v, BYTES[dtype] * LANES), dtype) for v in range(vectors)]
                    for r in range(rows):
                        its = builder.add(weight, builder.mul(row, ir.Constant(WHOLE, r)))
                        by = code.repeated(code.load(its, one))
                        for v in range(vectors):
                            cell = tile[r * vectors + v]
                            builder.store(code.fused(by, loaded[v], builder.load(cell)), cell)
            for r, v, cell in cells:
                total = builder.load(tiles[0][cell])
                for tile in tiles[1:]:
                    total = code.sum(total, builder.load(tile[cell]))
                # Last, so that a long sum is one of sums over blocks, which rounds less.
                factor = code.repeated(code.load(code.at(factors, r, 4), one))
                code.store(code.fused(factor, code.load(place(r, v)), total), place(r, v))
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 6), generate

    return weighted
