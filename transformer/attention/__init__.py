"""Attention modules that remember: interchangeable, each with a `kv_cache` of its own."""

from .base import Attention
from .gqa import GroupQueryAttention
from .mha import MultiHeadAttention
from .mqa import MultiQueryAttention
from .plan import plan_steps
from .projection import project

__all__ = ["Attention", "GroupQueryAttention", "MultiHeadAttention", "MultiQueryAttention", "plan_steps", "project"]
