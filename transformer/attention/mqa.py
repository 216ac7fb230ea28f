"""Multi-query attention (Fast Transformer Decoding, arXiv 1911.02150)."""

from typing import Any

from .base import Attention


class MultiQueryAttention(Attention):
    """Attention with one key/value head that all query heads share: `G = 1`.

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
        super().__init__(embed_dim, num_heads, 1, apply_causal_mask, use_kv_cache, **options)
