"""A projection of few rows, at the speed at which its weights can be read.

PyTorch's linear of one float32 row over weights that are not in the CPU's cache reaches a third of the memory
bandwidth; the same product as a small batch of matrices reaches nearly all of it. The rule below is fixed by shape,
dtype and device, so equal inputs give equal bits in every process.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

FEW_ROWS = 4
"""Rows up to which it pays; from 8 on both ways meet."""

MANY_WEIGHTS = 1 << 17
"""Weights from which on it pays: smaller ones stay in the CPU's cache."""

PARTS = 8
"""Slices of the output that are worked out side by side."""


def project(projection: nn.Module, x: Tensor) -> Tensor:
    """`projection(x)` for `x` [B, L, in], through the module itself wherever anything but its weights counts."""
    if type(projection) is nn.Linear and x.shape[0] * x.shape[1] <= FEW_ROWS and _only_weights_count(projection, x):
        return _few_rows(projection, x)
    out: Tensor = projection(x)
    return out


def _only_weights_count(linear: nn.Linear, x: Tensor) -> bool:
    weight = linear.weight
    return (
        not torch.is_grad_enabled()
        and weight.dtype is torch.float32
        and x.dtype is torch.float32
        and weight.is_cpu
        and weight.numel() >= MANY_WEIGHTS
        and weight.shape[0] % PARTS == 0
        and weight.is_contiguous()
        and type(weight) is nn.Parameter
        and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__)
        and not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
        and not torch.is_autocast_enabled("cpu")
    )


def _few_rows(linear: nn.Linear, x: Tensor) -> Tensor:
    bias: Tensor | None = linear.bias
    weight, (batch, length, width) = linear.weight, x.shape
    parts = weight.view(PARTS, -1, width)
    # The strides of the rows decide: as a transposed view it is quick, as a reshaped one slower than the linear.
    operand = x.contiguous().as_strided((PARTS, width, batch * length), (0, 1, width))
    out = torch.bmm(parts, operand) if bias is None else torch.baddbmm(bias.view(PARTS, -1, 1), parts, operand)
    if batch * length == 1:
        return out.view(1, 1, -1)
    return out.view(-1, batch * length).t().reshape(batch, length, -1)
