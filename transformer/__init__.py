"""Attention blocks for PyTorch that remember."""

from .attention import GroupQueryAttention, MultiHeadAttention, MultiQueryAttention
from .cache import LayerCache, Step
from .errors import AttentionError

__all__ = [
    "AttentionError",
    "GroupQueryAttention",
    "LayerCache",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "Step",
]
