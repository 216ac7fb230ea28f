"""Int8 weights by torchao, in our models and in those of transformers, and the bytes that a step reads of them."""

import warnings
from typing import TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def quantised(module: Module) -> Module:
    """The module with int8 weights and a scale for each row, in all its linear layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(module, Int8WeightOnlyConfig())
    return module


def stored(weight: Tensor) -> list[Tensor]:
    """The tensors in memory that a weight consists of: itself, or its int8 numbers and their scales."""
    from torchao.quantization import Int8Tensor

    return [weight.qdata, weight.scale] if isinstance(weight, Int8Tensor) else [weight.detach()]


def dequantised(weight: Tensor) -> Tensor:
    """The float numbers that an int8 weight stands for."""
    return weight.dequantize()
