"""Attention modules with a built-in KV cache: multi-head, multi-query and group-query, interchangeable."""

from ..cache import TokenLayout
from ..kernels import project
from .base import Attention
from .checks import real_in_every_row, real_tokens
from .conversion import from_torch, to_gqa, to_mha, to_mqa, to_torch
from .gqa import GroupQueryAttention
from .mha import MultiHeadAttention
from .mqa import MultiQueryAttention
from .plan import plan_steps, plan_without_cache
from .signatures import AttentionKeywords

__all__ = [
    "Attention",
    "AttentionKeywords",
    "GroupQueryAttention",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "TokenLayout",
    "from_torch",
    "plan_steps",
    "plan_without_cache",
    "project",
    "real_in_every_row",
    "real_tokens",
    "to_gqa",
    "to_mha",
    "to_mqa",
    "to_torch",
]
