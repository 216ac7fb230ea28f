"""Rotation of queries and keys by cosines and sines: both in one pass of a compiled kernel, where there can be one."""

import torch
from torch import Tensor

from . import tuning
from .backends import request
from .compiled import FLOAT_DTYPES, CompiledKernel, built_by, layouts, pool, switch, usable_threads
from .few_queries import is_readable

KERNELS = {
    dtype: CompiledKernel(
        f"rotation of {dtype}",
        built_by("small_operations", "build_rotation", dtype),
        lengths=(layouts.ROTATION_HEADER + 2 * layouts.ROTATION_FIELDS,),
    )
    for dtype in FLOAT_DTYPES
}


def rotate_in_one_pass(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor] | None:
    """Queries [B, H, L, D] and keys [B, G, L, D] with their first R dimensions rotated, in float32, rounded once.

    `cos` and `sin` float32 [L, R] or [B or 1, 1, L, R], the signs of the sines as in `RotaryTable`. None where a kernel
    cannot: other devices, dtypes and shapes, gradients, traced calls, heads whose numbers are not contiguous.
    """
    dtype = query.dtype
    kernel = KERNELS.get(dtype)
    if kernel is None or not is_readable(query, key, key) or not query.numel():
        return None
    if not request.allows_compiled or not switch.are_available() or torch.is_autocast_enabled("cpu"):
        return None
    (batch, heads, length, width), shape, rotary_dim = query.shape, cos.shape, cos.shape[-1]
    # Another scheme may have made the table: what fits only by broadcasting is not read.
    if not (
        shape == sin.shape
        and (shape == (length, rotary_dim) or shape in ((1, 1, length, rotary_dim), (batch, 1, length, rotary_dim)))
        and 0 < rotary_dim <= width
        and rotary_dim % 2 == 0
        and key.shape[2] == length
        and cos.dtype is sin.dtype is torch.float32
        and cos.is_cpu
        and sin.is_cpu
        and type(cos) is type(sin) is Tensor
    ):
        return None
    rotated_query, rotated_key = torch.empty_like(query), torch.empty_like(key)
    strides, key_strides = query.stride(), key.stride()
    if not (
        strides == rotated_query.stride()
        and key_strides == rotated_key.stride()
        and cos.is_contiguous()
        and sin.is_contiguous()
    ):
        return None
    tokens, threads = batch * length, 1
    if tokens * heads * width * dtype.itemsize >= tuning.active.min_parallel_bytes:
        threads = usable_threads()
    per_chunk = tokens if threads == 1 else -(-tokens // (pool.CHUNKS_PER_THREAD * threads))
    by_row = 0 if len(shape) == 2 or shape[0] == 1 else length * rotary_dim
    sizes = by_row, rotary_dim, batch, length, per_chunk, width, rotary_dim, int(interleaved), 0
    queries = query.data_ptr(), rotated_query.data_ptr(), heads, *strides[:3]
    keys = key.data_ptr(), rotated_key.data_ptr(), key.shape[1], *key_strides[:3]
    kernel.run(threads, (0, cos.data_ptr(), sin.data_ptr(), *sizes, *queries, *keys))
    return rotated_query, rotated_key
