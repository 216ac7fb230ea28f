"""Weights of linear layers as the compiled kernels read them: plain ones, and torchao's int8 as they are stored."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

INT8_TENSOR = "torchao.quantization", "Int8Tensor"
"""Where torchao's class is named. Compared by name: torchao may be missing, and costs a second to import."""


class LinearWeight(NamedTuple):
    """One weight [out, in] with its bias."""

    numbers: Tensor
    """[out, in], float or int8, contiguous."""
    scales: Tensor | None
    """float32, out x groups numbers: what one int8 number is worth in each group of a row."""
    zero_points: Tensor | None
    """int8, as many: the number that stands for 0."""
    bias: Tensor | None


def linear_weight(linear: nn.Linear, dtype: torch.dtype) -> LinearWeight | None:
    """The weight of an `nn.Linear` for rows of a dtype on the CPU; None where only the module knows what it does.

    torchao's int8 weights are taken where only weights are quantized: with symmetric or shifted numbers, one scale per
    output or per group of its inputs.
    """
    parameters = linear._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias", linear)
    if weight is None or bias is linear or weight.dtype is not dtype:
        return None
    if linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__:
        return None
    if bias is not None and not (type(bias) is nn.Parameter and bias.dtype is dtype and bias.is_cpu):
        return None
    if type(weight) is nn.Parameter:
        # The layout first: a sparse tensor cannot say whether it is contiguous.
        plain = weight.is_cpu and weight.layout is torch.strided and weight.is_contiguous()
        return LinearWeight(weight, None, None, bias) if plain else None
    kind = type(weight)
    return _int8(weight, bias) if (kind.__module__, kind.__name__) == INT8_TENSOR else None


def _int8(weight: Any, bias: Tensor | None) -> LinearWeight | None:
    try:
        numbers, scales, zero_points, block_size = weight.qdata, weight.scale, weight.zero_point, weight.block_size
        activations = weight.act_quant_kwargs, weight.act_pre_scale
    except AttributeError:
        # Another version of torchao: what is named otherwise, only the module knows.
        return None
    if activations != (None, None):
        return None
    parts = [(numbers, torch.int8), (scales, torch.float32)]
    if zero_points is not None:
        parts.append((zero_points, torch.int8))
    for stored, dtype in parts:
        if type(stored) is not Tensor or stored.dtype is not dtype or not stored.is_cpu or not stored.is_contiguous():
            return None
    outputs, width = numbers.shape
    # One scale for a run of inputs of one output, and as many zero points.
    one_each = scales.numel() * block_size[1] == width * outputs and block_size[0] == 1
    one_each = one_each and (zero_points is None or zero_points.numel() == scales.numel())
    return LinearWeight(numbers, scales, zero_points, bias) if one_each else None
