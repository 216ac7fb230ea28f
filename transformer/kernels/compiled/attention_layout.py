"""Numbers of one call of compiled attention, in order: what the kernel reads and `few_queries.py` writes.

A head here is a key/value head with the query heads that share it. The keys of each head are taken in parts; a chunk is
one part of one head. A tensor is an address and its strides: of rows, heads, tokens and dimensions, the last of which
is 1. Strides of queries and results are in numbers, those of keys and values in the bytes of an item: of a number, or 1
in records of `transformer/codecs/`.
"""

(
    CHUNKS,
    PARTS,
    PART_KEYS,
    PARTIALS,  # address of float32 [heads, parts, rows, MOST_LANES + padded width]; one part needs none
    FINISHED,  # address of int64 [heads]: how many parts are done
    GROUPS,
    PER_GROUP,
    LENGTH,
    HEAD_DIM,
    DTYPE,
    KEY_CODE,  # what keys are: one of the codes below
    KEY_ITEM,  # bytes of an item of them
    VALUE_CODE,
    VALUE_ITEM,
    SCALE,  # float32 in the lower half
    SOFTCAP,  # the same; 0: none
    ROWS,  # address of int64 [rows of the batch or 1, ROW_NUMBERS]
    ROW_STEP,  # numbers from row to row: 0 where all are equal
    CAUSAL,
    WINDOW,  # 0: none
    QUERY,
    KEY,
    VALUE,
    OUT,
    SLOPES,  # address of float32 [H], added to scores times the size of the distance; 0: none
    TABLE,  # address of float32 [H, TABLE_LENGTH], added to scores by the distance; 0: none
    TABLE_LENGTH,
    TABLE_FIRST,  # the distance of the first number; smaller ones take it, too, and larger ones the last
    SINKS,  # how many; 0: none
    SINK_DISTANCE,  # positions of queries for the sinks are clamped to this
    SINK_QUERY,
    SINK_KEY,
    SINK_VALUE,
    LSE,  # address of float32 [B, H, LENGTH]: takes the logarithms of the sums of exponentials; 0: not asked for
) = (*range(20), *range(20, 40, 5), *range(40, 46), *range(46, 61, 5), 61)

SIZE = 62

FIRST, START, END, PAST = range(4)
"""Numbers of a row: position of column 0, of the first and after the last token of the view, and of its first query."""

ROW_NUMBERS = 4

BLOCK = 64
"""Keys whose scores are formed at once: they stay in the core's first cache."""

MOST_LANES = 16
"""Numbers of a vector at most: rows of sums are padded to a multiple of them."""

FLOAT32, BFLOAT16, FLOAT16, INT8, FLOAT8, INT4 = range(6)
"""What queries, keys and values are: numbers of a dtype, or records of a codec. A record of numbers is these numbers.

Kinds up to INT8 are multiplied as they are stored where that is quicker, INT8 with its scales aside."""
