"""Numbers of one call of the kernels of projections, norms, rotation and encoding: how many there are, and of what.

Those of attention are in `attention_layout.py`.
"""

import struct
from functools import lru_cache

import torch

FLOAT_DTYPES = torch.float32, torch.bfloat16, torch.float16
"""Of what kernels compute from, and of their results."""

FEW_ROWS_HEADER = 8
"""Numbers before the first weight: the counter, `x`, rows, width, outputs of a chunk, groups of a row of weights, the
number of weights, and 0."""

FEW_ROWS_FIELDS = 6
"""Numbers of each weight: addresses of the result, the weights, scales, zero points and bias (0: none), and outputs."""

NORM_NUMBERS = 9
"""The counter; addresses of `x`, the weight and the result; rows, their width, rows of a chunk; `eps` as the bits of a
float32; and what is added to the weight."""

ROTATION_HEADER = 12
"""The counter; addresses of cosines and sines, and what they are apart from one row of the batch to the next and from
one token to the next; batch, length, tokens of a chunk; head_dim, rotary_dim, 1 for interleaved pairs; and 0."""

ROTATION_FIELDS = 6
"""Numbers of each of two tensors: addresses of `x` and the result, heads, strides of both by row, head and token."""

ENCODING_HEADER = 5
"""The counter; tokens of a row, tokens of all rows and of a chunk; head_dim."""

ENCODING_FIELDS = 8
"""Numbers of keys and of values: addresses of the numbers and the records, what the records are (by the codes of
`attention_layout.py`), their bytes, heads (0: nothing to do), and strides of the numbers by row, head and token."""

ATTENTION_NUMBERS = 2
"""The counter, and the address of the numbers of `attention_layout.py`."""


@lru_cache(maxsize=64)
def float32_bits(number: float) -> int:
    """The bits of a number as float32."""
    bits: int = struct.unpack("<i", struct.pack("<f", number))[0]
    return bits
