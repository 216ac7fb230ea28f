"""Llama 2, 3 and 3.1 (arXiv 2302.13971, 2307.09288, 2407.21783), and the names that other families share with them."""

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ..entries import UNALTERED, Causal, Entry, Fixed, Flag, Head, Heads, Number, Token, Whole, Word
from ..family import STOP, Family
from ..limits import MAX_CHECKPOINT_LAYERS
from ..names import Names
from ..rope import Rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}

SIZES: tuple[Entry, ...] = (
    Whole("vocab_size", "vocab_size"),
    Whole("d_model", "hidden_size"),
    Whole("d_ff", "intermediate_size"),
    Whole("num_layers", "num_hidden_layers", most=MAX_CHECKPOINT_LAYERS),
)
"""Entries of all families with the names of Llama."""

NAMES: Names = {
    "embedding.tokens": "model.embed_tokens",
    "decoder.blocks.{}.attention_residual.norm_before": "model.layers.{}.input_layernorm",
    "decoder.blocks.{}.attention.q_proj": "model.layers.{}.self_attn.q_proj",
    "decoder.blocks.{}.attention.k_proj": "model.layers.{}.self_attn.k_proj",
    "decoder.blocks.{}.attention.v_proj": "model.layers.{}.self_attn.v_proj",
    "decoder.blocks.{}.attention.out_proj": "model.layers.{}.self_attn.o_proj",
    "decoder.blocks.{}.feed_forward_residual.norm_before": "model.layers.{}.post_attention_layernorm",
    "decoder.blocks.{}.feed_forward.gate_proj": "model.layers.{}.mlp.gate_proj",
    "decoder.blocks.{}.feed_forward.up_proj": "model.layers.{}.mlp.up_proj",
    "decoder.blocks.{}.feed_forward.down_proj": "model.layers.{}.mlp.down_proj",
    "decoder.norm": "model.norm",
    "head.proj": "lm_head",
}

ENTRIES: tuple[Entry, ...] = (
    *SIZES,
    Number("norm_eps", "rms_norm_eps", 1e-6),
    Word("activation", "hidden_act", ACTIVATIONS, "silu"),
    Causal(),
    *UNALTERED,
    Fixed(norm="rms", feed_forward="gated", position="rotary"),
)
"""Entries of families that also compute like Llama, without those of heads, rotary embeddings, biases and windows."""

IGNORED = ("model.layers.{}.self_attn.rotary_emb.inv_freq",)

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *ENTRIES,
        Heads(),
        Head("LlamaModel"),
        Rope(2048),
        Token("start_token", "bos_token_id", 1),
        Flag("attention_bias", "attention_bias"),
        Flag("feed_forward_bias", "mlp_bias"),
    ),
    names=NAMES,
    base="model.",
    ignored=IGNORED,
    tokens={STOP: 2},
)
