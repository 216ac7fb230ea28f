"""Multi-head attention (Attention Is All You Need, arXiv 1706.03762)."""

from typing_extensions import Unpack

from .base import Attention
from .signatures import AttentionKeywords


class MultiHeadAttention(Attention):
    """Attention with as many key/value heads as query heads: `G = H`.

    Takes the arguments of `Attention` but `num_groups`; `forward` is the same for all three modules. The options are
    `head_dim`, `kv_dim`, `bias`, `out_bias`, `dropout`, `position`, `window_size`, `num_sinks`, `qk_norm`,
    `qk_norm_per_head`, `scale`, `softcap`, `sink_logits`, `max_cache_length`, `cache_dtype`, `cache_budget`,
    `mask_rule`, `score_rule`, `device`, `dtype`.
    """

    token_wise = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        apply_causal_mask: bool = False,
        use_kv_cache: bool = False,
        **options: Unpack[AttentionKeywords],
    ) -> None:
        super().__init__(embed_dim, num_heads, num_heads, apply_causal_mask, use_kv_cache, **options)
