"""Qwen3-MoE (arXiv 2505.09388): Qwen3 with a mixture of experts in all layers."""

from collections.abc import Mapping
from typing import Any

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ..documents import Keys
from ..entries import Entry, Fixed, Flag, Head, Heads, Only, Options, Token, Whole
from ..family import Family
from ..limits import MAX_EXPERTS
from ..names import EXPERT, Stored
from ..rope import Rope
from .llama import ENTRIES, IGNORED
from .mixtral import NAMES_AROUND_EXPERTS

_WINDOW, _SWITCH = "sliding_window", "use_sliding_window"


class _Experts(Entry):
    """How many experts: `num_experts`, which newer files call `num_local_experts`."""

    def read(self, keys: Keys) -> Options:
        key = "num_local_experts" if "num_local_experts" in keys and "num_experts" not in keys else "num_experts"
        return {"num_experts": keys.whole(key, 128, most=MAX_EXPERTS)}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_experts": options["num_experts"]}

    @property
    def keys(self) -> Mapping[str, str]:
        return {"num_experts": "num_experts"}


class _Window(Entry):
    """The window of all layers, where a switch turns it on."""

    def read(self, keys: Keys) -> Options:
        if not keys.flag(_SWITCH, False):
            return {"window_size": None}
        return {"window_size": keys.whole(_WINDOW) if _WINDOW in keys else keys.missing(_WINDOW, 4096)}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {_WINDOW: options["window_size"], _SWITCH: options["window_size"] is not None}


_OURS, _THEIRS = "decoder.blocks.{}.", "model.layers.{}."

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *ENTRIES,
        Rope(32768),
        Token("start_token", "bos_token_id"),
        Heads(groups=4),
        Head("Qwen3MoeModel"),
        Flag("attention_bias", "attention_bias"),
        _Window(),
        _Experts(),
        Whole("experts_per_token", "num_experts_per_tok", 8, most=MAX_EXPERTS),
        # `intermediate_size` is the width of layers without experts.
        Whole("d_ff", "moe_intermediate_size", 768),
        Flag("normalize_routing_weights", "norm_topk_prob"),
        Only("decoder_sparse_step", 1),
        Only("mlp_only_layers", []),
        Fixed(feed_forward="mixture", qk_norm=True),
    ),
    names={
        **NAMES_AROUND_EXPERTS,
        f"{_OURS}attention.q_norm": f"{_THEIRS}self_attn.q_norm",
        f"{_OURS}attention.k_norm": f"{_THEIRS}self_attn.k_norm",
        f"{_OURS}feed_forward.router": f"{_THEIRS}mlp.gate",
        f"{_OURS}feed_forward.gate_proj": Stored(f"{_THEIRS}mlp.experts.{EXPERT}.gate_proj"),
        f"{_OURS}feed_forward.up_proj": Stored(f"{_THEIRS}mlp.experts.{EXPERT}.up_proj"),
        f"{_OURS}feed_forward.down_proj": Stored(f"{_THEIRS}mlp.experts.{EXPERT}.down_proj"),
    },
    base="model.",
    ignored=IGNORED,
)
