"""OLMo 2 (arXiv 2501.00656): norms on the output of each branch, and of queries and keys over all heads together."""

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ..entries import Fixed, Flag, Head, Heads, Number, Token
from ..family import PAD, STOP, Family
from ..rope import Rope
from .llama import ENTRIES, IGNORED, NAMES

_LAYER, _THEIRS = "decoder.blocks.{}.", "model.layers.{}."

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *ENTRIES,
        # Another default than Llama's.
        Number("norm_eps", "rms_norm_eps", 1e-5),
        Heads(),
        Head("Olmo2Model"),
        Rope(2048),
        Token("start_token", "bos_token_id"),
        Flag("attention_bias", "attention_bias"),
        Fixed(norm_placement="branch", qk_norm=True, qk_norm_per_head=False),
    ),
    names={
        **NAMES,
        f"{_LAYER}attention.q_norm": f"{_THEIRS}self_attn.q_norm",
        f"{_LAYER}attention.k_norm": f"{_THEIRS}self_attn.k_norm",
        f"{_LAYER}attention_residual.norm_branch": f"{_THEIRS}post_attention_layernorm",
        f"{_LAYER}feed_forward_residual.norm_branch": f"{_THEIRS}post_feedforward_layernorm",
    },
    base="model.",
    ignored=IGNORED,
    tokens={STOP: 50279, PAD: 1},
)
