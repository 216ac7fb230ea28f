"""Encoding of new keys and values: the records of both in one pass of a compiled kernel, where there can be one."""

import torch
from torch import Tensor

from ..codecs import Codec, Coding
from . import tuning
from .compiled import FLOAT_DTYPES, CompiledKernel, built_by, layouts, may_compute, pool, usable_threads
from .few_queries import RECORD_CODES

KERNELS = {
    dtype: CompiledKernel(
        f"encoding of {dtype}",
        built_by("encoding", "build", dtype),
        lengths=(layouts.ENCODING_HEADER + 2 * layouts.ENCODING_FIELDS,),
    )
    for dtype in FLOAT_DTYPES
}


def encoded(coding: Coding, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """What `coding.encoded` makes of keys and values [B, G, L, D], to the bit."""
    dtype, shape = key.dtype, key.shape
    kernel = KERNELS.get(dtype)
    if (
        kernel is None
        or not may_compute(key)
        or type(value) is not Tensor
        or not value.is_cpu
        or value.dtype is not dtype
        or value.shape != shape
        or shape[3] != coding.head_dim
        or not key.stride(3) == value.stride(3) == 1
        or not key.numel()
    ):
        return coding.encoded(key, value)
    tokens, threads = shape[0] * shape[2], 1
    if 2 * key.numel() * dtype.itemsize >= tuning.active.min_parallel_bytes:
        threads = usable_threads()
    per_chunk = tokens if threads == 1 else -(-tokens // (pool.CHUNKS_PER_THREAD * threads))
    keys, its_key = _fields(coding.key, key)
    values, its_value = _fields(coding.value, value)
    kernel.run(threads, (0, shape[2], tokens, per_chunk, shape[3], *its_key, *its_value))
    return keys, values


def _fields(codec: Codec | None, numbers: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The records to write, and the kernel's numbers; the numbers themselves and no heads where there is no codec."""
    if codec is None:
        return numbers, (0,) * layouts.ENCODING_FIELDS
    batch, heads, length, width = numbers.shape
    record_bytes = codec.record_bytes(width)
    records = torch.empty((batch, heads, length, record_bytes), dtype=torch.uint8, device="cpu")
    addresses = numbers.data_ptr(), records.data_ptr()
    return records, (*addresses, RECORD_CODES[codec.name], record_bytes, heads, *numbers.stride()[:3])
