"""OPT (arXiv 2205.01068): learned positions from row 2 on."""

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ..decoder_entries import Biases, Switch
from ..entries import UNALTERED, Alias, Causal, Fixed, Head, Only, Token, Whole, Word
from ..family import PAD, STOP, Family
from ..limits import MAX_CHECKPOINT_LAYERS, MAX_HEADS
from .llama import ACTIVATIONS

_LAYER, _THEIRS = "decoder.blocks.{}", "model.decoder.layers.{}"

OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        Whole("vocab_size", "vocab_size"),
        Whole("d_model", "hidden_size"),
        Whole("d_ff", "ffn_dim"),
        Whole("num_heads", "num_attention_heads", most=MAX_HEADS),
        Whole("num_layers", "num_hidden_layers", most=MAX_CHECKPOINT_LAYERS),
        Whole("max_length", "max_position_embeddings", 2048),
        # Embeddings of another width, between projections.
        Alias("word_embed_proj_dim", "hidden_size"),
        Head("OPTModel", tied=True),
        Token("start_token", "bos_token_id", 2),
        Word("activation", "activation_function", ACTIVATIONS, "relu"),
        Switch("norm_placement", "do_layer_norm_before", "before", "after", default=True),
        Only("_remove_final_layer_norm", False),
        Only("layer_norm_elementwise_affine", True),
        Biases("enable_bias", default=True),
        Causal(),
        *UNALTERED,
        Fixed(
            attention="mha", norm="layer", norm_eps=1e-5, feed_forward="plain", position="learned", position_offset=2
        ),
    ),
    names={
        "embedding.tokens": "model.decoder.embed_tokens",
        "positions.positions.embedding": "model.decoder.embed_positions",
        f"{_LAYER}.attention.q_proj": f"{_THEIRS}.self_attn.q_proj",
        f"{_LAYER}.attention.k_proj": f"{_THEIRS}.self_attn.k_proj",
        f"{_LAYER}.attention.v_proj": f"{_THEIRS}.self_attn.v_proj",
        f"{_LAYER}.attention.out_proj": f"{_THEIRS}.self_attn.out_proj",
        f"{_LAYER}.attention_residual.norm_before": f"{_THEIRS}.self_attn_layer_norm",
        f"{_LAYER}.attention_residual.norm_after": f"{_THEIRS}.self_attn_layer_norm",
        f"{_LAYER}.feed_forward.up_proj": f"{_THEIRS}.fc1",
        f"{_LAYER}.feed_forward.down_proj": f"{_THEIRS}.fc2",
        f"{_LAYER}.feed_forward_residual.norm_before": f"{_THEIRS}.final_layer_norm",
        f"{_LAYER}.feed_forward_residual.norm_after": f"{_THEIRS}.final_layer_norm",
        "decoder.norm": "model.decoder.final_layer_norm",
        "head.proj": "lm_head",
    },
    base="model.",
    tokens={STOP: 2, PAD: 1},
    ignored=("model.decoder.version",),
)
