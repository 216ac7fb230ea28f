"""StableLM (arXiv 2402.17834): Llama with layer norms, rotation of a part of each head, and parallel residuals."""

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ..decoder_entries import EvenHeads, Switch
from ..entries import UNALTERED, Causal, Fixed, Flag, Head, Heads, Number, Only, Token, Word
from ..family import STOP, Family
from ..rope import Rope
from .llama import ACTIVATIONS, IGNORED, NAMES, SIZES

STABLELM = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *SIZES,
        EvenHeads(),
        Heads(groups=32),
        Head("StableLmModel"),
        Rope(4096, part=0.25),
        Token("start_token", "bos_token_id", 0),
        Number("norm_eps", "layer_norm_eps", 1e-5),
        Word("activation", "hidden_act", ACTIVATIONS, "silu"),
        Flag("attention_bias", "use_qkv_bias"),
        Switch("residual", "use_parallel_residual", "parallel_one_norm", "sequential", default=False),
        # Norms of queries and keys with weights for each head.
        Only("qk_layernorm", False),
        Causal(),
        *UNALTERED,
        Fixed(out_bias=False, norm="layer", feed_forward="gated", position="rotary"),
    ),
    names=NAMES,
    base="model.",
    ignored=IGNORED,
    tokens={STOP: 0},
)
