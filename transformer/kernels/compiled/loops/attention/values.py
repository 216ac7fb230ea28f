"""Values in compiled attention: sums of a block of values by the weights of all query rows of one head."""

from typing import Any

from numba import njit

from ...attention_layout import BFLOAT16, FLOAT16, FLOAT32, INT8
from .places import BLOCK, Room, vector_rows
from .products import SUM_STRIDE, TILE_VECTORS, WEIGHT_KEY, WEIGHT_ROW, weighted_sums_of
from .vectors import AS_WRITTEN, BYTES, LANES, read_float, write_float, write_whole
from .weights import FACTORS, STATE_BYTES


def _tiles_of(dtype: int) -> Any:
    """A function of kernels that adds weighted values of a stored dtype to the sums of up to four rows."""
    small_1, small_2, small_4 = (weighted_sums_of(rows, 1, dtype) for rows in (1, 2, 4))
    large_1, large_2, large_4 = (weighted_sums_of(rows, TILE_VECTORS, dtype) for rows in (1, 2, 4))
    size, large = BYTES[dtype], TILE_VECTORS * LANES

    @njit(**AS_WRITTEN)
    def add(room: Room, rows: int, places: tuple[int, int, int, int], count: int) -> None:
        weights, values, sums, factors = places
        done = 0
        while done < room.width:
            value, total = values + size * done, sums + 4 * done
            if room.width - done >= large:
                if rows == 4:
                    large_4(room.frame, weights, value, count, total, factors)
                elif rows == 2:
                    large_2(room.frame, weights, value, count, total, factors)
                else:
                    large_1(room.frame, weights, value, count, total, factors)
                done += large
            else:
                if rows == 4:
                    small_4(room.frame, weights, value, count, total, factors)
                elif rows == 2:
                    small_2(room.frame, weights, value, count, total, factors)
                else:
                    small_1(room.frame, weights, value, count, total, factors)
                done += LANES

    return add


_float32, _bfloat16, _float16, _int8 = map(_tiles_of, (FLOAT32, BFLOAT16, FLOAT16, INT8))


@njit(**AS_WRITTEN)
def _add(stored: int, room: Room, rows: int, places: tuple[int, int, int, int], count: int) -> None:
    if stored == FLOAT32:
        _float32(room, rows, places, count)
    elif stored == BFLOAT16:
        _bfloat16(room, rows, places, count)
    elif stored == FLOAT16:
        _float16(room, rows, places, count)
    else:
        _int8(room, rows, places, count)


@njit(**AS_WRITTEN)
def add_values(stored: int, room: Room, values: int, count: int) -> None:
    """Adds `count` (even) values of a stored dtype, weighted, to the sums of all rows."""
    write_whole(room.frame, SUM_STRIDE, 4 * room.width)
    if room.rows == 2:
        # Each row is a vector of its own, but both read the values together.
        write_whole(room.frame, WEIGHT_ROW, 4 * BLOCK)
        write_whole(room.frame, WEIGHT_KEY, 4)
        for row in range(2):
            write_float(room.lanes, row, read_float(room.states + STATE_BYTES * row + FACTORS, 0))
        _add(stored, room, 2, (room.scores, values, room.sums, room.lanes), count)
        return
    write_whole(room.frame, WEIGHT_ROW, 4)
    first = 0
    while first < room.rows:
        rows = vector_rows(room.rows - first)
        write_whole(room.frame, WEIGHT_KEY, 4 * rows)
        scores, state = room.scores + 4 * BLOCK * first, room.states + STATE_BYTES * first
        for row in range(0, rows, 4):
            if first + row < room.rows:
                sums = room.sums + 4 * (first + row) * room.width
                places = scores + 4 * row, values, sums, state + FACTORS + 4 * row
                _add(stored, room, min(rows, 4), places, count)
        first += rows
