"""Grouped-query attention (GQA, arXiv 2305.13245)."""

from typing import Any

from .base import Attention


class GroupQueryAttention(Attention):
    """Attention with `num_groups` key/value heads, each shared by `H / G` query heads in a row.

    Takes the arguments of `Attention`; `forward` is the same for all three modules.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_groups: int,
        apply_causal_mask: bool = False,
        use_kv_cache: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, num_groups, apply_causal_mask, use_kv_cache, **options)
