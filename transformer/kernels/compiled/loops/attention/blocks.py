"""Blocks of keys in compiled attention: scores, biases, masks, weights and sums of all query rows of one head."""

from typing import Any

import numpy as np
from numba import njit

from .....codecs.scaled import SCALE_BYTES
from ... import attention_layout as at
from ...attention_layout import BFLOAT16, FLOAT8, FLOAT16, FLOAT32, INT8
from ..pointers import prefetch
from .places import BLOCK, Keys, Room, token_columns, token_sinks, vector_rows
from .products import KEY_STRIDE, KEY_WIDTH, QUERY_STRIDE, SCALE, VALUE_STRIDE, scores_of
from .records import gather_scales
from .rows import copy_of
from .values import add_values
from .vectors import AS_WRITTEN, DOT_PAIRS, LANES, float_of_bits, read_float, read_whole, write_float, write_whole
from .weights import STATE_BYTES, cap_scores, scale_of, slope_of, softmax_of

FAR_BYTES = 1 << 22
"""Bytes of all keys of a call from which on blocks are asked for before they are needed: fewer are in the core's own
cache. 16 heads of 64 over 8,192 keys, one thread of a busy Intel Xeon, 2026-11-28: float32 8.2 instead of 9.9 ms,
bfloat16 3.4 instead of 5.9, int8 1.4 instead of 2.0."""

MOST_DIRECT_ROWS = 2
"""Query rows up to which 16-bit and int8 keys are read as they are: for more, copies in the cache are quicker."""

MOST_DIRECT_VALUE_ROWS = 8
"""The same of values."""

_scores_1, _scores_4, _scores_all = (scores_of(rows) for rows in (1, 4, LANES))
_scores_twice = scores_of(LANES, vectors=2)
_pairs_1, _pairs_4, _pairs_all = (scores_of(rows, pairs=DOT_PAIRS) for rows in (1, 4, LANES))
_bfloat16_1, _float16_1, _int8_1 = (scores_of(1, dtype) for dtype in (BFLOAT16, FLOAT16, INT8))
_softmax_1, _softmax_4, _softmax_all = (softmax_of(rows) for rows in (1, 4, LANES))
_scale_1, _scale_4, _scale_all = (scale_of(rows) for rows in (1, 4, LANES))
_slope_1, _slope_4, _slope_all = (slope_of(rows) for rows in (1, 4, LANES))
_copy_float32, _copy_bfloat16, _copy_float16, _copy_int8, _copy_float8, _copy_int4 = map(copy_of, range(6))


@njit(**AS_WRITTEN)
def copy_rows(kind: int, source: int, stride: int, sizes: tuple[int, int], target: int) -> None:
    """(rows, width) numbers of a kind of numbers or records as float32, padded."""
    count, width = sizes
    if kind == FLOAT32:
        _copy_float32(source, stride, count, width, target)
    elif kind == BFLOAT16:
        _copy_bfloat16(source, stride, count, width, target)
    elif kind == FLOAT16:
        _copy_float16(source, stride, count, width, target)
    elif kind == INT8:
        _copy_int8(source, stride, count, width, target)
    elif kind == FLOAT8:
        _copy_float8(source, stride, count, width, target)
    else:
        _copy_int4(source, stride, count, width, target)


@njit(**AS_WRITTEN)
def uses_pairs(call: Any) -> bool:
    """Whether products of queries and keys are summed by twos, as they are stored."""
    both = call[at.DTYPE] == BFLOAT16 and call[at.KEY_CODE] == BFLOAT16
    return DOT_PAIRS and both and call[at.HEAD_DIM] % (2 * LANES) == 0


@njit(**AS_WRITTEN)
def _score(kind: tuple[int, int], room: Room, queries: int, keys: int, count: int, scores: int) -> None:
    """Scores of one vector of query rows, by its rows and what the keys are: numbers of a kind, or -1 for pairs."""
    rows, stored = kind
    if stored < 0:
        if rows == 1:
            _pairs_1(room.frame, queries, keys, count, scores)
        elif rows == 4:
            _pairs_4(room.frame, queries, keys, count, scores)
        else:
            _pairs_all(room.frame, queries, keys, count, scores)
    elif rows == 1:
        if stored == FLOAT32:
            _scores_1(room.frame, queries, keys, count, scores)
        elif stored == BFLOAT16:
            _bfloat16_1(room.frame, queries, keys, count, scores)
        elif stored == FLOAT16:
            _float16_1(room.frame, queries, keys, count, scores)
        else:
            _int8_1(room.frame, queries, keys, count, scores)
    elif rows == 4:
        _scores_4(room.frame, queries, keys, count, scores)
    else:
        _scores_all(room.frame, queries, keys, count, scores)


@njit(**AS_WRITTEN)
def _add_biases(
    call: Any, room: Room, keys: Keys, vector: tuple[int, int], block: tuple[int, int], scores: int
) -> None:
    """Adds what the distances between the queries of a vector and the keys of a block make of their scores."""
    (first, rows), (begin, filled) = vector, block
    length, numbers = call[at.LENGTH], call[at.ROWS] + 8 * keys.head[0] * call[at.ROW_STEP]
    offset = 0 if keys.sinks else read_whole(numbers, at.FIRST)
    slopes, table = call[at.SLOPES], call[at.TABLE]
    for lane in range(LANES):
        row = min(first + lane % rows, room.rows - 1)
        position = read_whole(numbers, at.PAST) + row % length
        if keys.sinks:
            position = min(position, call[at.SINK_DISTANCE])
        distance = position - offset - begin
        if slopes:
            write_float(room.lanes, lane, read_float(slopes, keys.head[1] + row // length))
            write_float(room.lanes, LANES + lane, np.float32(distance - lane // rows))
        elif lane < rows:
            head = table + 4 * call[at.TABLE_LENGTH] * (keys.head[1] + row // length)
            last = call[at.TABLE_LENGTH] - 1
            for key in range(filled):
                index = min(max(distance - key - call[at.TABLE_FIRST], 0), last)
                place = key * rows + lane
                write_float(scores, place, read_float(scores, place) + read_float(head, index))
    if slopes:
        if rows == 1:
            _slope_1(scores, filled, room.lanes, room.lanes + 4 * LANES)
        elif rows == 4:
            _slope_4(scores, filled, room.lanes, room.lanes + 4 * LANES)
        else:
            _slope_all(scores, filled, room.lanes, room.lanes + 4 * LANES)


@njit(**AS_WRITTEN)
def _hide(call: Any, room: Room, keys: Keys, vector: tuple[int, int], block: tuple[int, int], scores: int) -> None:
    """-inf for the keys of a block that a query does not see, and for those that fill it up."""
    (first, rows), (begin, filled) = vector, block
    for lane in range(min(rows, room.rows - first)):
        token = (first + lane) % call[at.LENGTH]
        if keys.sinks:
            low, high = 0, token_sinks(call, keys.head[0], token)
        else:
            low, high = token_columns(call, keys.head[0], token)
        for key in range(filled):
            if begin + key < low or begin + key >= high:
                write_float(scores, key * rows + lane, np.float32(-np.inf))


@njit(**AS_WRITTEN)
def _scale(rows: int, scores: int, filled: int, scales: int) -> None:
    if rows == 1:
        _scale_1(scores, filled, scales)
    elif rows == 4:
        _scale_4(scores, filled, scales)
    else:
        _scale_all(scores, filled, scales)


@njit(**AS_WRITTEN)
def _weigh(call: Any, room: Room, keys: Keys, kind: int, block: tuple[int, int], place: int) -> None:
    """Weights of all rows for the keys of a block that stand at `place`, and the state of the rows with them."""
    begin, filled = block
    cap, last = float_of_bits(call[at.SOFTCAP]), call[at.LENGTH] - 1
    if keys.sinks:
        low, high = 0, token_sinks(call, keys.head[0], 0)
    else:
        low, high = token_columns(call, keys.head[0], last)[0], token_columns(call, keys.head[0], 0)[1]
    all_seen = begin >= low and begin + filled <= high
    biased = call[at.SLOPES] != 0 or call[at.TABLE] != 0
    if kind == INT8:
        gather_scales(place, keys.key[1], filled, room.scales)
        place += SCALE_BYTES
    first = scored = 0
    while first < room.rows:
        rows = vector_rows(room.rows - first)
        scores, state = room.scores + 4 * BLOCK * first, room.states + STATE_BYTES * first
        if first >= scored:
            queries = room.queries + 4 * first * room.width
            if kind == FLOAT32 and vector_rows(room.rows - first - LANES) == LANES:
                _scores_twice(room.frame, queries, place, filled, scores)
                scored = first + 2 * LANES
            else:
                _score((rows, kind), room, queries, place, filled, scores)
        if kind == INT8:
            _scale(rows, scores, filled, room.scales)
        if cap > 0:
            cap_scores(scores, filled * rows // LANES, cap)
        if biased:
            _add_biases(call, room, keys, (first, rows), block, scores)
        if not all_seen:
            _hide(call, room, keys, (first, rows), block, scores)
        if rows == 1:
            _softmax_1(scores, filled, state)
        elif rows == 4:
            _softmax_4(scores, filled, state)
        else:
            _softmax_all(scores, filled, state)
        first += rows


@njit(**AS_WRITTEN)
def _scale_weights(room: Room, count: int, records: int, stride: int) -> None:
    """Multiplies the weights of all rows for the values of a block by the scales of these."""
    gather_scales(records, stride, count, room.scales)
    first = 0
    while first < room.rows:
        rows = vector_rows(room.rows - first)
        _scale(rows, room.scores + 4 * BLOCK * first, count, room.scales)
        first += rows


@njit(**AS_WRITTEN)
def attend(call: Any, room: Room, keys: Keys) -> None:
    """All queries of one head over its keys, block by block, beside what their states and sums say already."""
    key_kind, value_kind, width, head_dim = call[at.KEY_CODE], call[at.VALUE_CODE], room.width, call[at.HEAD_DIM]
    pairs = uses_pairs(call)
    words = head_dim // 2 if pairs else width
    direct = pairs or key_kind == FLOAT32 or (key_kind <= INT8 and room.rows <= MOST_DIRECT_ROWS)
    write_whole(room.frame, KEY_WIDTH, words)
    write_whole(room.frame, SCALE, call[at.SCALE])
    write_whole(room.frame, QUERY_STRIDE, 4 * LANES * width)
    far = call[at.CHUNKS] * call[at.PART_KEYS] * keys.key[1] >= FAR_BYTES
    for begin in range(keys.columns[0], keys.columns[1], BLOCK):
        count = min(BLOCK, keys.columns[1] - begin)
        filled = (count + LANES - 1) // LANES * LANES
        key, value = keys.key[0] + begin * keys.key[1], keys.value[0] + begin * keys.value[1]
        whole = count == filled and head_dim == width
        if whole and direct:
            write_whole(room.frame, KEY_STRIDE, keys.key[1])
            place, kind = key, -1 if pairs else key_kind
        else:
            copied = FLOAT32 if pairs else key_kind
            copy_rows(copied, key, keys.key[1], (count, words if pairs else head_dim), room.keys)
            write_whole(room.frame, KEY_STRIDE, 4 * words)
            place, kind = room.keys, -1 if pairs else FLOAT32
        # The memory works on what comes next while the core works on what is there.
        if far:
            prefetch(value, count * keys.value[1])
        _weigh(call, room, keys, kind, (begin, filled), place)
        if far and begin + BLOCK < keys.columns[1]:
            prefetch(key + BLOCK * keys.key[1], BLOCK * keys.key[1])
        if whole and value_kind <= INT8 and (value_kind == FLOAT32 or room.rows <= MOST_DIRECT_VALUE_ROWS):
            if value_kind == INT8:
                _scale_weights(room, count, value, keys.value[1])
                value += SCALE_BYTES
            write_whole(room.frame, VALUE_STRIDE, keys.value[1])
            add_values(value_kind, room, value, count)
        else:
            copy_rows(value_kind, value, keys.value[1], (count, head_dim), room.values)
            write_whole(room.frame, VALUE_STRIDE, 4 * width)
            add_values(FLOAT32, room, room.values, filled)
