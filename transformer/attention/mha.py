"""Multi-head attention (Attention Is All You Need, arXiv 1706.03762)."""

from typing import Any

from .base import Attention


class MultiHeadAttention(Attention):
    """Attention with as many key/value heads as query heads: `G = H`.

    Takes the arguments of `Attention` but `num_groups`; `forward` is the same for all three modules.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        apply_causal_mask: bool = False,
        use_kv_cache: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, num_heads, apply_causal_mask, use_kv_cache, **options)
