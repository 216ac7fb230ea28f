"""Norms: root mean square and layer normalisation of tensors, and the way of a decode step of few rows on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tracing import is_traced, real_tensors
from . import tuning
from .compiled import FLOAT_DTYPES, CompiledKernel, built_by, layouts, may_compute, pool, usable_threads

KERNELS = {
    dtype: CompiledKernel(
        f"RMS norm of {dtype}", built_by("small_operations", "build_rms_norm", dtype), lengths=(layouts.NORM_NUMBERS,)
    )
    for dtype in FLOAT_DTYPES
}

with real_tensors(), torch.inference_mode(False):
    ONE = torch.ones(1, 1, 1, dtype=torch.float32, device="cpu")
    """The tensor that a product multiplies by `eps` and adds."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last dimension of `x` [..., dim]; `1 + weight` with an offset.

    Computed in at least float32 where dtypes differ or an offset is added. The result has the narrower dtype.
    """
    dtype = weight.dtype
    if (
        x.dtype is dtype
        and dtype in FLOAT_DTYPES
        and may_compute(x)
        and type(weight) in (nn.Parameter, Tensor)
        and weight.is_cpu
        and x.is_contiguous()
        and weight.is_contiguous()
        and (numbers := x.numel()) > 0
        and x.shape[-1] == (width := weight.shape[0])
    ):
        out = torch.empty_like(x)
        rows, threads = numbers // width, 1
        if numbers * dtype.itemsize >= tuning.active.min_parallel_bytes:
            threads = usable_threads()
        per_chunk = rows if threads == 1 else -(-rows // (pool.CHUNKS_PER_THREAD * threads))
        addresses = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        sizes = rows, width, per_chunk, layouts.float32_bits(eps), int(unit_offset)
        KERNELS[dtype].run(threads, (0, *addresses, *sizes))
        return out
    if x.dtype is not dtype or unit_offset:
        x, weight, dtype = _in_one_dtype(x, weight, unit_offset)
    if (
        x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not is_traced(x)  # no size is asked for while traced
        and x.ndim == 3
        and x.shape[1] == 1
        and 0 < x.shape[0] <= tuning.active.max_norm_rows
        and x.dtype is not torch.float64
    ):
        # Four operations instead of eight: a tenth of a decode step of many small layers was norms.
        x = x.float()
        size = torch.baddbmm(ONE, x, x.transpose(1, 2), beta=eps, alpha=1.0 / weight.shape[0])
        out = x.mul(size.rsqrt_()).mul_(weight)
    else:
        out = F.rms_norm(x, weight.shape, weight, eps)
    return out if out.dtype is dtype else out.to(dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, unit_offset: bool = False) -> Tensor:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last dimension, in dtypes as `rms_norm`."""
    dtype = weight.dtype
    if x.dtype is not dtype or unit_offset:
        x, weight, dtype = _in_one_dtype(x, weight, unit_offset)
    out = F.layer_norm(x, weight.shape, weight, None if bias is None else bias.to(weight.dtype), eps)
    return out if out.dtype is dtype else out.to(dtype)


def _in_one_dtype(x: Tensor, weight: Tensor, unit_offset: bool) -> tuple[Tensor, Tensor, torch.dtype]:
    """`x` and the factor in the wider of their dtypes, in at least float32 for an offset; the narrower is the result's.

    They differ under autocast, whose 16-bit results are multiplied by float32 weights, and where a 16-bit model keeps
    its stream in float32.
    """
    wide = torch.promote_types(x.dtype, weight.dtype)
    dtype = weight.dtype if x.dtype is wide else x.dtype
    if unit_offset:
        wide = torch.promote_types(wide, torch.float32)
    factor = weight.to(wide)
    return x.to(wide), 1.0 + factor if unit_offset else factor, dtype
