"""Conversions between attention modules: of one kind into another, and to and from `torch.nn.MultiheadAttention`."""

from .convert import to_gqa, to_mha, to_mqa
from .torch_modules import from_torch, to_torch

__all__ = ["from_torch", "to_gqa", "to_mha", "to_mqa", "to_torch"]
