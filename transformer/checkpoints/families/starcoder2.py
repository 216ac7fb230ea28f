"""StarCoder2 (arXiv 2402.19173): grouped queries with a window, layer norms, biases, and plain networks of GELU."""

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ..decoder_entries import Biases
from ..entries import UNALTERED, Causal, Fixed, Head, Heads, Number, Token, WholeOrNone, Word
from ..family import STOP, Family
from ..rope import Rope
from .llama import ACTIVATIONS, IGNORED, NAMES, SIZES

STARCODER2 = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *SIZES,
        Heads(groups=2),
        Head("Starcoder2Model", tied=True),
        Rope(4096),
        Token("start_token", "bos_token_id", 50256),
        Number("norm_eps", "norm_epsilon", 1e-5),
        # First the word that published files have.
        Word("activation", "hidden_act", {"gelu_pytorch_tanh": "gelu_tanh", **ACTIVATIONS}, "gelu_pytorch_tanh"),
        WholeOrNone("window_size", "sliding_window"),
        Biases("use_bias", default=True),
        Causal(),
        *UNALTERED,
        Fixed(norm="layer", feed_forward="plain", position="rotary"),
    ),
    names={
        **NAMES,
        "decoder.blocks.{}.feed_forward.up_proj": "model.layers.{}.mlp.c_fc",
        "decoder.blocks.{}.feed_forward.down_proj": "model.layers.{}.mlp.c_proj",
    },
    base="model.",
    ignored=IGNORED,
    tokens={STOP: 50256},
)
