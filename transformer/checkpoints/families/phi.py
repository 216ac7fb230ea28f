"""Phi-1, Phi-1.5 (arXiv 2309.05463) and Phi-2: one norm for both branches, rotation of a part, biases everywhere."""

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ..entries import UNALTERED, Causal, Fixed, Head, Heads, Number, Only, Token, Word
from ..family import STOP, Family
from ..rope import Rope
from .llama import ACTIVATIONS, IGNORED, NAMES, SIZES

PHI = Family(
    model_type="phi",
    architecture="PhiForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *SIZES,
        Heads(),
        Head("PhiModel"),
        Rope(2048, part=0.5),
        Token("start_token", "bos_token_id", 1),
        Number("norm_eps", "layer_norm_eps", 1e-5),
        # First the word that published files have.
        Word("activation", "hidden_act", {"gelu_new": "gelu_tanh", **ACTIVATIONS}, "gelu_new"),
        Only("qk_layernorm", False),
        Causal(),
        *UNALTERED,
        Fixed(
            attention_bias=True,
            residual="parallel_one_norm",
            norm="layer",
            feed_forward="plain",
            feed_forward_bias=True,
            position="rotary",
            head_bias=True,
        ),
    ),
    names={
        **NAMES,
        "decoder.blocks.{}.attention.out_proj": "model.layers.{}.self_attn.dense",
        "decoder.blocks.{}.feed_forward.up_proj": "model.layers.{}.mlp.fc1",
        "decoder.blocks.{}.feed_forward.down_proj": "model.layers.{}.mlp.fc2",
        "decoder.norm": "model.final_layernorm",
    },
    base="model.",
    ignored=IGNORED,
    tokens={STOP: 2},
)
