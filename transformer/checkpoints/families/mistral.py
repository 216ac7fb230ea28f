"""Mistral (arXiv 2310.06825): Llama with a window over all layers."""

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ..entries import Fixed, Flag, Heads, Number, Only, WholeOrNone, Word
from ..family import Family
from ..rope import Rope
from .llama import ACTIVATIONS, IGNORED, NAMES, SIZES

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *SIZES,
        Heads(),
        Rope(),
        Number("norm_eps", "rms_norm_eps", 1e-6),
        Word("activation", "hidden_act", ACTIVATIONS, "silu"),
        WholeOrNone("window_size", "sliding_window", 4096),
        Flag("tied_embeddings", "tie_word_embeddings"),
        Only("quantization_config", None),
        Fixed(norm="rms", feed_forward="gated", position="rotary"),
    ),
    names=NAMES,
    base="model.",
    ignored=IGNORED,
)
