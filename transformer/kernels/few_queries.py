"""Attention of a few queries over many keys by a compiled kernel, without a mask: positions say who sees what.

Each key is read once for all query heads of its group and all new tokens of its row, as it is stored: in the dtype of
the queries, or as the record of a codec. Everything is computed in float32.
"""

from array import array

import torch
from torch import Tensor

from ..codecs import Codec, Coding
from ..tracing import is_plain_eager
from . import tuning
from .compiled import CompiledKernel, built_by, pool, usable_threads
from .compiled import attention_layout as layout
from .compiled.layouts import ATTENTION_NUMBERS, float32_bits
from .position_inputs import DistanceBias, PositionedSinks, Positions

FLOAT_CODES = {torch.float32: layout.FLOAT32, torch.bfloat16: layout.BFLOAT16, torch.float16: layout.FLOAT16}
"""The dtypes of queries and results, as the kernel numbers them."""

RECORD_CODES = {
    "float32": layout.FLOAT32,
    "bfloat16": layout.BFLOAT16,
    "float16": layout.FLOAT16,
    "int8": layout.INT8,
    "float8_e4m3fn": layout.FLOAT8,
    "int4": layout.INT4,
}
"""What records are, by the names of their codecs."""

KERNEL = CompiledKernel("attention of few queries", built_by("attention.chunks", "build"), lengths=(ATTENTION_NUMBERS,))


def is_readable(query: Tensor, key: Tensor, value: Tensor, coding: Coding | None = None) -> bool:
    """Whether the kernel may read these tensors: plain ones on the CPU, of contiguous heads, without gradients.

    It trusts their shapes, so they fit together: `query` [B, H, L, D], `key` and `value` both [B, G, S, D] or, with a
    `coding`, what that makes of them.
    """
    dtype, shape = query.dtype, key.shape
    return (
        query.is_cpu
        and key.is_cpu
        and value.is_cpu
        and not torch.is_grad_enabled()
        and is_plain_eager(query)
        and dtype in FLOAT_CODES
        and type(key) is type(value) is Tensor
        and query.shape[0] == shape[0]
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and (
            key.dtype is value.dtype is dtype and shape == value.shape and query.shape[3] == shape[3]
            if coding is None
            else _fit(coding, query, key, value)
        )
    )


def _fit(coding: Coding, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether keys and values are numbers as the query's, or records, where their codec says so."""
    for codec, stored in ((coding.key, key), (coding.value, value)):
        if codec is None:
            dtype, width = query.dtype, coding.head_dim
        else:
            dtype, width = torch.uint8, codec.record_bytes(coding.head_dim)
            if codec.name not in RECORD_CODES:
                return False
        if stored.dtype is not dtype or stored.shape[3] != width:
            return False
    return query.shape[3] == coding.head_dim and key.shape[:3] == value.shape[:3]


def attend_few(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    causal: bool = False,
    positions: Positions | None = None,
    sinks: PositionedSinks | None = None,
    bias: DistanceBias | None = None,
    coding: Coding | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention of `query` [B, H, L, D] over `key`, `value` [B, G, S, D]: [B, H, L, D]; 0 for a query without a key.

    On the CPU, without gradients, for contiguous head dimensions, float32 or 16-bit queries, and keys of the same
    dtype; with a `coding`, keys and values are what `coding.encoded` made of such. Each query sees all keys or, with
    `causal=True`, those up to itself, the queries being the last of them; or `positions` say what it sees. `lse`,
    contiguous float32 [B, H, L], takes the logarithms of the sums of exponentials: -inf for a query without a key.
    """
    batch, heads, length, head_dim = query.shape
    _, groups, keys, width = key.shape
    rows: tuple[int, ...] = (0, 0, keys, keys - length)
    row_step, longest, window = 0, keys, 0
    if positions is not None:
        causal, window = positions.causal, positions.window or 0
        rows, row_step = _rows(positions)
        if window:
            longest = min(longest, (1 if causal else 2) * window + length)
    out = torch.empty_like(query)
    number, per_group = batch * groups, heads // groups
    threads, parts, part_keys = 1, 1, longest
    key_item, value_item = key.itemsize, value.itemsize
    if 2 * number * longest * width * key_item >= tuning.active.min_parallel_bytes:
        threads, parts, part_keys = _parts(number, longest)
    partials, finished = _NO_PARTIALS
    if parts > 1:
        padded = -(-head_dim // layout.MOST_LANES) * layout.MOST_LANES
        room = number * parts * per_group * length * (layout.MOST_LANES + padded)
        # On the CPU whatever the default device is.
        merged = torch.empty(room, dtype=torch.float32, device="cpu")
        counters = array("q", bytes(8 * number))
        partials, finished = merged.data_ptr(), counters.buffer_info()[0]
    if coding is None:
        key_code = value_code = FLOAT_CODES[key.dtype]
    else:
        key_code, value_code = _code(coding.key, key), _code(coding.value, value)
    table = array("q", rows)
    numbers = array(
        "q",
        (
            number * parts,
            parts,
            part_keys,
            partials,
            finished,
            groups,
            per_group,
            length,
            head_dim,
            FLOAT_CODES[query.dtype],
            key_code,
            key_item,
            value_code,
            value_item,
            float32_bits(scale),
            0 if softcap is None else float32_bits(softcap),
            table.buffer_info()[0],
            row_step,
            causal,
            window,
            query.data_ptr(),
            *query.stride(),
            key.data_ptr(),
            *key.stride(),
            value.data_ptr(),
            *value.stride(),
            out.data_ptr(),
            *out.stride(),
            *(_NO_EXTRAS if bias is None and sinks is None else _extras(bias, sinks)),
            0 if lse is None else lse.data_ptr(),
        ),
    )
    KERNEL.run(threads, (0, numbers.buffer_info()[0]))
    return out


_NO_PARTIALS = 0, 0
_NO_EXTRAS = (0,) * (layout.LSE - layout.SLOPES)


def _parts(heads: int, keys: int) -> tuple[int, int, int]:
    """Threads, parts of the keys of each head, and keys of a part: enough chunks that no thread waits for long."""
    threads = usable_threads()
    wanted = pool.CHUNKS_PER_THREAD * threads
    if threads == 1 or heads >= wanted:
        return threads, 1, keys
    part_keys = max(-(-keys * heads // wanted), tuning.active.min_part_keys)
    part_keys = -(-part_keys // layout.BLOCK) * layout.BLOCK
    return threads, max(-(-keys // part_keys), 1), part_keys


def _rows(positions: Positions) -> tuple[tuple[int, ...], int]:
    """The numbers of each row, and how many they are: none from row to row where all rows are equal."""
    four = positions.first, positions.start, positions.end, positions.past
    count = max(map(len, four))
    if count == 1:
        return tuple(numbers[0] for numbers in four), 0
    return tuple(number for row in positions.of_rows(count) for number in row), layout.ROW_NUMBERS


def _code(codec: Codec | None, stored: Tensor) -> int:
    """What keys or values are."""
    return FLOAT_CODES[stored.dtype] if codec is None else RECORD_CODES[codec.name]


def _extras(bias: DistanceBias | None, sinks: PositionedSinks | None) -> tuple[int, ...]:
    """The numbers of biases and sinks."""
    slopes = table = table_length = first = 0
    if bias is not None:
        first = bias.first
        slopes = 0 if bias.slopes is None else bias.slopes.data_ptr()
        if bias.table is not None:
            table, table_length = bias.table.data_ptr(), bias.table.shape[1]
    if sinks is None:
        return slopes, table, table_length, first, *(0,) * (layout.LSE - layout.SINKS)
    tensors = [number for each in (sinks.query, sinks.key, sinks.value) for number in (each.data_ptr(), *each.stride())]
    return slopes, table, table_length, first, sinks.key.shape[2], sinks.max_distance, *tensors
