"""Mistral (arXiv 2310.06825): Llama with a window over all layers."""

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ..entries import Heads, WholeOrNone
from ..family import Family
from .llama import ENTRIES, IGNORED, NAMES

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(*ENTRIES, Heads(), WholeOrNone("window_size", "sliding_window", 4096)),
    names=NAMES,
    base="model.",
    ignored=IGNORED,
)
