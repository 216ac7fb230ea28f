"""Attention of a few queries over many keys as one compiled kernel: parts of the keys of each head, merged.

A chunk reads one part of the keys of one key/value head for all query rows that share it, with an online softmax
(arXiv 1805.02867) in float32. The thread that finishes the last part of a head merges them, in their order, so the
result does not depend on which thread was faster (flash decoding, arXiv 2205.14135).
"""

import math
from typing import Any

import numpy as np
from numba import carray, njit, types

from ... import attention_layout as at
from ...attention_layout import BFLOAT16, FLOAT16, FLOAT32
from ...kernel import compiled_callback, sources_stamp
from ..pointers import depends_on, next_chunk, pointer_at
from .blocks import attend, copy_rows, uses_pairs
from .places import Keys, Room, room_at, room_bytes, token_columns, token_sinks, vector_rows
from .rows import add_row, arrange_of, fill, write_of
from .vectors import AS_WRITTEN, LANES, add_shared, read_float, write_float
from .weights import STATE_BYTES, SUMS

_arrange_1, _arrange_4, _arrange_all = (arrange_of(rows) for rows in (1, 4, LANES))
_write_float32, _write_bfloat16, _write_float16 = (write_of(dtype) for dtype in (FLOAT32, BFLOAT16, FLOAT16))

_room_bytes = njit(**AS_WRITTEN)(room_bytes)


@njit(**AS_WRITTEN)
def _row_at(call: Any, field: int, head: tuple[int, int], row: int) -> int:
    """The address of one query row, or row of results, of a head (row of the batch, number)."""
    length, size = call[at.LENGTH], 4 if call[at.DTYPE] == FLOAT32 else 2
    number = head[1] * call[at.PER_GROUP] + row // length
    offset = head[0] * call[field + 1] + number * call[field + 2] + row % length * call[field + 3]
    address: int = call[field] + size * offset
    return address


@njit(**AS_WRITTEN)
def _place_queries(call: Any, room: Room, field: int, head: tuple[int, int]) -> None:
    """Puts the query rows of a head into the lanes of vectors, as float32 or as pairs; zeros where no row is."""
    pairs, head_dim = uses_pairs(call), call[at.HEAD_DIM]
    words = head_dim // 2 if pairs else room.width
    first = 0
    while first < room.rows:
        rows = vector_rows(room.rows - first)
        phases, target = LANES // rows, room.queries + 4 * first * room.width
        if first + rows > room.rows:
            fill(target, rows * room.width // LANES, np.float32(0.0))
        for row in range(min(rows, room.rows - first)):
            source = _row_at(call, field, head, first + row)
            if not pairs:
                copy_rows(call[at.DTYPE], source, 0, (1, head_dim), room.keys)
                source = room.keys
            place = target + 4 * phases * row
            if rows == 1:
                _arrange_1(source, words, place)
            elif rows == 4:
                _arrange_4(source, words, place)
            else:
                _arrange_all(source, words, place)
        first += rows


@njit(**AS_WRITTEN)
def _write_row(call: Any, source: int, factor: float, target: int) -> None:
    if call[at.DTYPE] == FLOAT32:
        _write_float32(source, call[at.HEAD_DIM], factor, target)
    elif call[at.DTYPE] == BFLOAT16:
        _write_bfloat16(source, call[at.HEAD_DIM], factor, target)
    else:
        _write_float16(source, call[at.HEAD_DIM], factor, target)


@njit(**AS_WRITTEN)
def _publish(call: Any, room: Room, head: tuple[int, int], row: int, state: tuple[float, float], sums: int) -> None:
    """Writes the result of one query row by its (largest score, sum of weights): 0 where it sees nothing."""
    token = row % call[at.LENGTH]
    low, high = token_columns(call, head[0], token)
    target = _row_at(call, at.OUT, head, row)
    top, total = state
    nothing = low >= high and token_sinks(call, head[0], token) == 0
    if nothing:
        fill(sums, room.width // LANES, np.float32(0.0))
        _write_row(call, sums, np.float32(0.0), target)
    else:
        _write_row(call, sums, np.float32(1.0) / total, target)
    if call[at.LSE]:
        rows = call[at.PER_GROUP] * call[at.LENGTH]
        lse = np.float32(-np.inf) if nothing else top + np.float32(math.log(total))
        write_float(call[at.LSE], (head[0] * call[at.GROUPS] + head[1]) * rows + row, lse)


@njit(**AS_WRITTEN)
def _finish(call: Any, room: Room, head: tuple[int, int], partial: int) -> None:
    """Writes the results of the only part, or this part's largest scores, sums of weights and sums of values."""
    first = 0
    while first < room.rows:
        rows = vector_rows(room.rows - first)
        state = room.states + STATE_BYTES * first
        for row in range(min(rows, room.rows - first)):
            total = np.float32(0.0)
            for lane in range(row, LANES, rows):
                total += read_float(state + SUMS, lane)
            sums = room.sums + 4 * (first + row) * room.width
            if call[at.PARTS] == 1:
                _publish(call, room, head, first + row, (read_float(state, row), total), sums)
            else:
                target = partial + 4 * (first + row) * (at.MOST_LANES + room.width)
                write_float(target, 0, read_float(state, row))
                write_float(target, 1, total)
                _write_float32(sums, room.width, np.float32(1.0), target + 4 * at.MOST_LANES)
        first += rows


@njit(**AS_WRITTEN)
def _merge(call: Any, room: Room, head: tuple[int, int], partials: int) -> None:
    """Attention over all keys of a head from that over its parts."""
    size, parts = 4 * (at.MOST_LANES + room.width), call[at.PARTS]
    for row in range(room.rows):
        top = np.float32(-np.inf)
        for part in range(parts):
            top = max(top, read_float(partials + size * (part * room.rows + row), 0))
        total = np.float32(0.0)
        fill(room.sums, room.width // LANES, np.float32(0.0))
        for part in range(parts):
            source = partials + size * (part * room.rows + row)
            its = read_float(source, 1)
            # A part without a visible key has no largest score either.
            if its != 0.0:
                share = np.float32(math.exp(read_float(source, 0) - top))
                total += share * its
                add_row(source + 4 * at.MOST_LANES, room.width // LANES, share, room.sums)
        _publish(call, room, head, row, (top, total), room.sums)


@njit(**AS_WRITTEN)
def _keys_at(call: Any, field: int, item: int, head: tuple[int, int]) -> tuple[int, int]:
    """The address of the keys or values of a head, and the bytes from token to token."""
    offset = head[0] * call[field + 1] + head[1] * call[field + 2]
    return call[field] + item * offset, item * call[field + 3]


@njit(**AS_WRITTEN)
def _attend_part(call: Any, room: Room, head: tuple[int, int], part: int) -> None:
    """One part of the keys of a head; the first part has the sinks, too."""
    batch_row, group = head
    last, query_head = call[at.LENGTH] - 1, group * call[at.PER_GROUP]
    key_item, value_item = call[at.KEY_ITEM], call[at.VALUE_ITEM]
    fill(room.sums, room.rows * room.width // LANES, np.float32(0.0))
    for row in range(room.rows):
        state = room.states + STATE_BYTES * row
        fill(state, 1, np.float32(-np.inf))
        fill(state + SUMS, 1, np.float32(0.0))
    sinks = token_sinks(call, batch_row, last) if part == 0 else 0
    if sinks:
        _place_queries(call, room, at.SINK_QUERY, head)
        key, value = _keys_at(call, at.SINK_KEY, key_item, head), _keys_at(call, at.SINK_VALUE, value_item, head)
        attend(call, room, Keys(key, value, (0, sinks), (batch_row, query_head), True))
    low, high = token_columns(call, batch_row, 0)[0], token_columns(call, batch_row, last)[1]
    low += part * call[at.PART_KEYS]
    high = min(high, low + call[at.PART_KEYS])
    if low < high:
        _place_queries(call, room, at.QUERY, head)
        key, value = _keys_at(call, at.KEY, key_item, head), _keys_at(call, at.VALUE, value_item, head)
        attend(call, room, Keys(key, value, (low, high), (batch_row, query_head), False))


def build() -> Any:
    """The kernel; its numbers are those of `attention_layout.py`, at the address that follows the counter."""
    stamp = sources_stamp()

    def kernel(numbers: Any) -> None:
        depends_on(stamp)
        call = carray(pointer_at(carray(numbers, 2)[1], types.int64), at.SIZE)
        rows = call[at.PER_GROUP] * call[at.LENGTH]
        width = (call[at.HEAD_DIM] + LANES - 1) // LANES * LANES
        memory = np.empty(_room_bytes(rows, width) + 64, np.uint8)
        room = room_at((np.int64(memory.ctypes.data) + 63) // 64 * 64, rows, width)
        parts, groups = call[at.PARTS], call[at.GROUPS]
        chunk = next_chunk(numbers)
        while chunk < call[at.CHUNKS]:
            number, part = chunk // parts, chunk % parts
            head = number // groups, number % groups
            partials = call[at.PARTIALS] + 4 * number * parts * rows * (at.MOST_LANES + width)
            _attend_part(call, room, head, part)
            _finish(call, room, head, partials + 4 * part * rows * (at.MOST_LANES + width))
            if parts > 1 and add_shared(call[at.FINISHED] + 8 * number, 1) == parts - 1:
                _merge(call, room, head, partials)
            chunk = next_chunk(numbers)
        # Kept to here: the addresses in it are no references.
        memory[0] = 0

    return compiled_callback(kernel, "attention")
