"""GPT-2 (Radford et al., Language Models are Unsupervised Multitask Learners, 2019)."""

from collections.abc import Mapping
from typing import Any

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ..documents import Keys
from ..entries import UNALTERED, Alias, Causal, Entry, Fixed, Head, Number, Only, Options, Token, Whole, Word
from ..family import STOP, Family
from ..limits import MAX_CHECKPOINT_LAYERS, MAX_COUNT, MAX_HEADS
from ..names import Stored

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

_FUSED = "transformer.h.{}.attn.c_attn"
"""Queries, keys and values, stored as one module."""


class _Inner(Entry):
    """Width of the feed-forward network; default: four times the width of the model."""

    def read(self, keys: Keys) -> Options:
        if "n_inner" in keys:
            return {"d_ff": keys.whole("n_inner")}
        return {"d_ff": 4 * keys.whole("n_embd", most=MAX_COUNT // 4)}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"n_inner": options["d_ff"]}


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        Whole("vocab_size", "vocab_size"),
        Whole("d_model", "n_embd"),
        Whole("num_heads", "n_head", most=MAX_HEADS),
        Whole("num_layers", "n_layer", most=MAX_CHECKPOINT_LAYERS),
        Whole("max_length", "n_positions", 1024),
        _Inner(),
        Token("start_token", "bos_token_id", 50256),
        Number("norm_eps", "layer_norm_epsilon", 1e-5),
        Word("activation", "activation_function", ACTIVATIONS, "gelu_new"),
        Head("GPT2Model", tied=True),
        Alias("hidden_size", "n_embd"),
        Alias("num_attention_heads", "n_head"),
        Alias("num_hidden_layers", "n_layer"),
        Alias("max_position_embeddings", "n_positions", 1024),
        Only("scale_attn_weights", True),
        Only("scale_attn_by_inverse_layer_idx", False),
        Only("add_cross_attention", False),
        Causal(),
        *UNALTERED,
        Fixed(
            attention="mha",
            attention_bias=True,
            position="learned",
            norm="layer",
            feed_forward="plain",
            feed_forward_bias=True,
        ),
    ),
    names={
        "embedding.tokens": "transformer.wte",
        "positions.positions.embedding": "transformer.wpe",
        "decoder.blocks.{}.attention_residual.norm_before": "transformer.h.{}.ln_1",
        "decoder.blocks.{}.attention.q_proj": Stored(_FUSED, transposed=True, part=0, parts=(1, 1, 1)),
        "decoder.blocks.{}.attention.k_proj": Stored(_FUSED, transposed=True, part=1, parts=(1, 1, 1)),
        "decoder.blocks.{}.attention.v_proj": Stored(_FUSED, transposed=True, part=2, parts=(1, 1, 1)),
        "decoder.blocks.{}.attention.out_proj": Stored("transformer.h.{}.attn.c_proj", transposed=True),
        "decoder.blocks.{}.feed_forward_residual.norm_before": "transformer.h.{}.ln_2",
        "decoder.blocks.{}.feed_forward.up_proj": Stored("transformer.h.{}.mlp.c_fc", transposed=True),
        "decoder.blocks.{}.feed_forward.down_proj": Stored("transformer.h.{}.mlp.c_proj", transposed=True),
        "decoder.norm": "transformer.ln_f",
        "head.proj": "lm_head",
    },
    base="transformer.",
    tokens={STOP: 50256},
    # Causal masks, which old files contain as tensors.
    ignored=("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"),
)
