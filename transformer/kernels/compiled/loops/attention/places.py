"""Places and bounds of compiled attention: the scratch memory of a thread, the keys of a head, and who sees what."""

from typing import Any, NamedTuple

from numba import njit

from ... import attention_layout as at
from .products import FRAME_BYTES
from .vectors import AS_WRITTEN, LANES, read_whole
from .weights import STATE_BYTES

BLOCK = at.BLOCK


class Room(NamedTuple):
    """Addresses in the scratch memory of one thread, for `rows` query rows of `width` numbers, padded."""

    frame: int
    queries: int
    states: int
    scores: int
    sums: int
    keys: int
    values: int
    lanes: int
    """Slopes and distances of one vector."""
    scales: int
    """Of the records of one block."""
    rows: int
    width: int


class Keys(NamedTuple):
    """Keys and values that the queries of one head may see."""

    key: tuple[int, int]
    """The address of column 0, and the bytes from column to column."""
    value: tuple[int, int]
    columns: tuple[int, int]
    """The first, and the one after the last."""
    head: tuple[int, int]
    """The row of the batch, and the first query head that shares them."""
    sinks: bool


def room_bytes(rows: int, width: int) -> int:
    """Bytes of a `Room`."""
    vectors = (rows + LANES - 1) // LANES * LANES
    return FRAME_BYTES + vectors * (8 * width + 4 * BLOCK + STATE_BYTES) + 8 * BLOCK * width + 8 * LANES + 4 * BLOCK


@njit(**AS_WRITTEN)
def room_at(address: int, rows: int, width: int) -> Room:
    """The room that begins at an address."""
    vectors = (rows + LANES - 1) // LANES * LANES
    queries = address + FRAME_BYTES
    states = queries + 4 * vectors * width
    scores = states + STATE_BYTES * vectors
    sums = scores + 4 * BLOCK * vectors
    keys = sums + 4 * vectors * width
    values = keys + 4 * BLOCK * width
    lanes = values + 4 * BLOCK * width
    return Room(
        frame=address,
        queries=queries,
        states=states,
        scores=scores,
        sums=sums,
        keys=keys,
        values=values,
        lanes=lanes,
        scales=lanes + 8 * LANES,
        rows=rows,
        width=width,
    )


@njit(**AS_WRITTEN)
def vector_rows(rest: int) -> int:
    """Query rows of the next vector, while so many are left: wasted rows cost less than one more vector."""
    if rest > LANES - 6:
        return LANES
    return 4 if rest > 2 else 1


@njit(**AS_WRITTEN)
def token_columns(call: Any, row: int, token: int) -> tuple[int, int]:
    """The columns [low, high) that one new token of a row of the batch sees, sinks aside; none where low >= high."""
    numbers = call[at.ROWS] + 8 * row * call[at.ROW_STEP]
    first, low, high = read_whole(numbers, at.FIRST), read_whole(numbers, at.START), read_whole(numbers, at.END)
    position, window = read_whole(numbers, at.PAST) + token, call[at.WINDOW]
    if window:
        low = max(low, position - window + 1)
    if call[at.CAUSAL]:
        high = min(high, position + 1)
    elif window:
        high = min(high, position + window)
    return low - first, high - first


@njit(**AS_WRITTEN)
def token_sinks(call: Any, row: int, token: int) -> int:
    """How many sinks one new token sees beside the columns of its window: all before them."""
    if call[at.SINKS] == 0:
        return 0
    low = token_columns(call, row, token)[0] + read_whole(call[at.ROWS] + 8 * row * call[at.ROW_STEP], at.FIRST)
    number: int = max(min(low, call[at.SINKS]), 0)
    return number
