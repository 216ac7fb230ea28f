"""BLOOM (arXiv 2211.05100): ALiBi, and a norm after the embedding."""

from collections.abc import Mapping
from typing import Any

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ..decoder_entries import TwoNames
from ..documents import Keys
from ..entries import UNALTERED, Causal, Entry, Fixed, Head, Number, Only, Options, Token, Whole, WholeOrNone
from ..family import STOP, Family
from ..limits import MAX_CHECKPOINT_LAYERS, MAX_HEADS
from ..names import Names, heads_in_turn

_LAYER, _THEIRS = "decoder.blocks.{}", "transformer.h.{}"


class _Inner(Entry):
    """Width of the feed-forward network: four times the width of the model."""

    def read(self, keys: Keys) -> Options:
        return {"d_ff": 4 * keys.whole("hidden_size" if "hidden_size" in keys else "n_embed")}

    def write(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {}


def _layout(config: DecoderOnlyConfig) -> Names:
    return heads_in_turn(f"{_THEIRS}.self_attention.query_key_value", config.num_heads, config.kv_heads)


NAMES: Names = {
    "embedding.tokens": "transformer.word_embeddings",
    f"{_LAYER}.attention.out_proj": f"{_THEIRS}.self_attention.dense",
    f"{_LAYER}.feed_forward.up_proj": f"{_THEIRS}.mlp.dense_h_to_4h",
    f"{_LAYER}.feed_forward.down_proj": f"{_THEIRS}.mlp.dense_4h_to_h",
    "decoder.norm": "transformer.ln_f",
    "head.proj": "lm_head",
}
"""Names that Falcon has too; its norms and layouts of queries, keys and values are its own."""

BLOOM = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        Whole("vocab_size", "vocab_size"),
        TwoNames("d_model", "hidden_size", "n_embed"),
        TwoNames("num_heads", "n_head", "num_attention_heads", most=MAX_HEADS),
        TwoNames("num_layers", "n_layer", "num_hidden_layers", most=MAX_CHECKPOINT_LAYERS),
        _Inner(),
        WholeOrNone("context_length", "seq_length"),
        Head("BloomModel", tied=True),
        Token("start_token", "bos_token_id", 1),
        Number("norm_eps", "layer_norm_epsilon", 1e-5),
        Only("apply_residual_connection_post_layernorm", False),
        # Products in slices, in which transformers leaves out the bias.
        Only("slow_but_exact", False),
        Causal(),
        *UNALTERED,
        Fixed(
            attention="mha",
            attention_bias=True,
            position="alibi",
            norm="layer",
            embedding_norm=True,
            feed_forward="plain",
            feed_forward_bias=True,
            activation="gelu_tanh",
        ),
    ),
    names={
        **NAMES,
        "positions.norm": "transformer.word_embeddings_layernorm",
        f"{_LAYER}.attention_residual.norm_before": f"{_THEIRS}.input_layernorm",
        f"{_LAYER}.feed_forward_residual.norm_before": f"{_THEIRS}.post_attention_layernorm",
    },
    layout=_layout,
    base="transformer.",
    tokens={STOP: 2},
)
