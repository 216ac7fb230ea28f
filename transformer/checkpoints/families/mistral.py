"""Mistral (arXiv 2310.06825): Llama with a sliding window in all layers."""

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ..entries import Head, Heads, Token, WholeOrNone
from ..family import STOP, Family
from ..rope import Rope
from .llama import ENTRIES, IGNORED, NAMES

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *ENTRIES,
        Heads(groups=8),
        Head("MistralModel"),
        Rope(131072),
        Token("start_token", "bos_token_id", 1),
        WholeOrNone("window_size", "sliding_window", 4096),
    ),
    names=NAMES,
    base="model.",
    ignored=IGNORED,
    tokens={STOP: 2},
)
