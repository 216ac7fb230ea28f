"""GPT-NeoX (arXiv 2204.06745) and Pythia (arXiv 2304.01373): parallel residuals with a norm for each branch."""

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ..decoder_entries import EvenHeads, Switch
from ..entries import UNALTERED, Causal, Fixed, Flag, Head, Number, Token, Whole, Word
from ..family import STOP, Family
from ..limits import MAX_HEADS
from ..names import Names, heads_in_turn
from ..rope import Rope
from .llama import ACTIVATIONS, SIZES

_LAYER, _THEIRS = "decoder.blocks.{}", "gpt_neox.layers.{}"


def _layout(config: DecoderOnlyConfig) -> Names:
    return heads_in_turn(f"{_THEIRS}.attention.query_key_value", config.num_heads, config.kv_heads)


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *SIZES,
        Whole("num_heads", "num_attention_heads", most=MAX_HEADS),
        EvenHeads(),
        Head("GPTNeoXModel"),
        Rope(2048, part=0.25, base_key="rotary_emb_base", part_key="rotary_pct"),
        Token("start_token", "bos_token_id", 0),
        Number("norm_eps", "layer_norm_eps", 1e-5),
        Word("activation", "hidden_act", {"gelu_fast": "gelu_tanh", **ACTIVATIONS}, "gelu"),
        Flag("attention_bias", "attention_bias", default=True),
        Switch("residual", "use_parallel_residual", "parallel", "sequential", default=True),
        Causal(),
        *UNALTERED,
        Fixed(attention="mha", norm="layer", feed_forward="plain", feed_forward_bias=True, position="rotary"),
    ),
    names={
        "embedding.tokens": "gpt_neox.embed_in",
        f"{_LAYER}.attention_residual.norm_before": f"{_THEIRS}.input_layernorm",
        f"{_LAYER}.attention.out_proj": f"{_THEIRS}.attention.dense",
        f"{_LAYER}.feed_forward_residual.norm_before": f"{_THEIRS}.post_attention_layernorm",
        f"{_LAYER}.feed_forward.up_proj": f"{_THEIRS}.mlp.dense_h_to_4h",
        f"{_LAYER}.feed_forward.down_proj": f"{_THEIRS}.mlp.dense_4h_to_h",
        "decoder.norm": "gpt_neox.final_layer_norm",
        "head.proj": "embed_out",
    },
    layout=_layout,
    # The name in releases of transformers that rename it on loading.
    aliases={"embed_out": ("lm_head",)},
    base="gpt_neox.",
    tokens={STOP: 2},
    # Causal masks and rotary frequencies, which old files contain as tensors.
    ignored=tuple(f"{_THEIRS}.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")),
)
