"""Grouped-query attention (GQA, arXiv 2305.13245)."""

from typing_extensions import Unpack

from .base import Attention
from .option_checks import key_value_heads
from .signatures import AttentionKeywords


class GroupQueryAttention(Attention):
    """Attention with `num_groups` key/value heads, each shared by `H / G` query heads in a row.

    `num_kv_heads` is another name of `num_groups`; give exactly one of the two. Takes the arguments of `Attention`;
    `forward` is the same for all three modules. The options are `head_dim`, `kv_dim`, `bias`, `out_bias`, `dropout`,
    `position`, `window_size`, `num_sinks`, `qk_norm`, `qk_norm_per_head`, `scale`, `softcap`, `sink_logits`,
    `max_cache_length`, `cache_dtype`, `cache_budget`, `mask_rule`, `score_rule`, `device`, `dtype`.
    """

    token_wise = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_groups: int | None = None,
        apply_causal_mask: bool = False,
        use_kv_cache: bool = False,
        *,
        num_kv_heads: int | None = None,
        **options: Unpack[AttentionKeywords],
    ) -> None:
        groups = key_value_heads(num_groups, num_kv_heads)
        super().__init__(embed_dim, num_heads, groups, apply_causal_mask, use_kv_cache, **options)
