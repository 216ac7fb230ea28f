"""Attention blocks for PyTorch that remember."""

from .attention import GroupQueryAttention, MultiHeadAttention, MultiQueryAttention
from .cache import KVCache, LayerCache, Step
from .errors import AttentionError

__all__ = [
    "AttentionError",
    "GroupQueryAttention",
    "KVCache",
    "LayerCache",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "Step",
]
