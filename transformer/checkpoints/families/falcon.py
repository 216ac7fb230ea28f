"""Falcon (arXiv 2311.16867): parallel residuals with one norm or two, multi-query or grouped-query attention."""

from collections.abc import Mapping
from typing import Any

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ..decoder_entries import Biases, TwoNames
from ..documents import Keys
from ..entries import UNALTERED, Causal, Entry, Fixed, Head, Number, Only, Options, Token, Whole, Word
from ..family import STOP, Family
from ..limits import MAX_CHECKPOINT_LAYERS, MAX_COUNT, MAX_HEADS
from ..names import Names, heads_in_turn
from ..rope import Rope
from .bloom import NAMES
from .llama import ACTIVATIONS

_LAYER, _THEIRS = "decoder.blocks.{}", "transformer.h.{}"


class _Blocks(Entry):
    """Heads and residual connections: of the first models, and of those with `new_decoder_architecture`."""

    def read(self, keys: Keys) -> Options:
        heads, new = keys.whole("num_attention_heads", most=MAX_HEADS), keys.flag("new_decoder_architecture", False)
        # Null means false, as in transformers.
        parallel, multi_query = (keys.flag(name, keys.missing(name, True) or False) for name in _FLAGS)
        groups = 1
        if new or not multi_query:
            groups = keys.whole("num_kv_heads", heads, most=MAX_HEADS)
            if heads % groups or (groups != heads and not new):
                expected = f"a divisor of {heads}" if new else f"{heads} without multi_query"
                raise keys.refusal("num_kv_heads", f"{expected}, as there are so many num_attention_heads")
        if new and not parallel:
            raise keys.refusal("parallel_attn", "true with new_decoder_architecture")
        kind = "mha" if groups == heads else "mqa" if groups == 1 else "gqa"
        return {
            "num_heads": heads,
            "attention": kind,
            "num_groups": groups if kind == "gqa" else None,
            "residual": _residual(keys, new) if parallel else "sequential",
        }

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        kind, heads = options["attention"], options["num_heads"]
        two_norms = options["residual"] == "parallel"
        new = kind == "gqa" or two_norms
        groups = {"mha": heads, "mqa": 1}.get(kind, options["num_groups"])
        return {
            "num_attention_heads": heads,
            "num_kv_heads": groups if new else heads,
            "multi_query": kind == "mqa",
            "parallel_attn": options["residual"] != "sequential",
            "new_decoder_architecture": new,
            "num_ln_in_parallel_attn": 1 + two_norms,
        }


_FLAGS = ("parallel_attn", "multi_query")


def _residual(keys: Keys, new: bool) -> str:
    norms = keys.whole("num_ln_in_parallel_attn", 1 + new, most=1 + new)
    return "parallel" if norms == 2 else "parallel_one_norm"


class _Inner(Entry):
    """Width of the feed-forward network; default: four times the width of the model."""

    def read(self, keys: Keys) -> Options:
        if "ffn_hidden_size" in keys:
            return {"d_ff": keys.whole("ffn_hidden_size")}
        width = "n_embed" if "n_embed" in keys else "hidden_size"
        return {"d_ff": 4 * keys.whole(width, most=MAX_COUNT // 4)}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"ffn_hidden_size": options["d_ff"]}


def _layout(config: DecoderOnlyConfig) -> Names:
    first, second = {
        "sequential": ("input_layernorm", "post_attention_layernorm"),
        "parallel": ("ln_attn", "ln_mlp"),
    }.get(config.residual, ("input_layernorm", ""))
    return {
        **heads_in_turn(f"{_THEIRS}.self_attention.query_key_value", config.num_heads, config.kv_heads),
        f"{_LAYER}.attention_residual.norm_before": f"{_THEIRS}.{first}",
        f"{_LAYER}.feed_forward_residual.norm_before": f"{_THEIRS}.{second}",
    }


FALCON = Family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        Whole("vocab_size", "vocab_size"),
        TwoNames("d_model", "hidden_size", "n_embed"),
        Whole("num_layers", "num_hidden_layers", most=MAX_CHECKPOINT_LAYERS),
        _Inner(),
        _Blocks(),
        Head("FalconModel", tied=True),
        Rope(2048),
        Token("start_token", "bos_token_id", 11),
        Number("norm_eps", "layer_norm_epsilon", 1e-5),
        Word("activation", "activation", ACTIVATIONS, "gelu"),
        Biases("bias", default=False),
        # Its slopes are scaled, and rounded to bfloat16.
        Only("alibi", False),
        Causal(),
        *UNALTERED,
        Fixed(norm="layer", feed_forward="plain", position="rotary"),
    ),
    names=NAMES,
    layout=_layout,
    base="transformer.",
    tokens={STOP: 11},
)
