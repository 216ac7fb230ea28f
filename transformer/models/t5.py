"""T5 and related models as configurations of the encoder-decoder."""

from dataclasses import dataclass
from typing import Any

from ..signatures import arguments_of
from .config import EncoderDecoderConfig, EncoderDecoderOptions, ModelConfig, OneVocabulary


@dataclass(frozen=True)
class T5Arguments(EncoderDecoderOptions, ModelConfig, OneVocabulary):
    """Arguments of the functions below: those of `EncoderDecoderConfig`, with one vocabulary of source and target."""


@arguments_of(T5Arguments)
def t5_config(
    vocab_size: int, d_model: int, num_heads: int, d_ff: int, num_layers: int, **options: Any
) -> EncoderDecoderConfig:
    """T5 as first published (arXiv 1910.10683): ReLU, and one table for source, target and head.

    The input of the head is multiplied by `d_model ** -0.5`. `options` are those of `EncoderDecoderConfig`; `head_dim`
    is 64 where none is given.
    """
    own = {"feed_forward": "plain", "activation": "relu", "logit_scale": d_model**-0.5}
    return _family(vocab_size, d_model, num_heads, d_ff, num_layers, **(own | options))


@arguments_of(T5Arguments)
def t5_v1_1_config(
    vocab_size: int, d_model: int, num_heads: int, d_ff: int, num_layers: int, **options: Any
) -> EncoderDecoderConfig:
    """T5 version 1.1, and mT5 (arXiv 2010.11934): gated GELU, and an untied head without scale."""
    own = {"activation": "gelu_tanh", "tied_embeddings": False}
    return _family(vocab_size, d_model, num_heads, d_ff, num_layers, **(own | options))


@arguments_of(T5Arguments)
def umt5_config(
    vocab_size: int, d_model: int, num_heads: int, d_ff: int, num_layers: int, **options: Any
) -> EncoderDecoderConfig:
    """UMT5 (arXiv 2304.09151): T5 version 1.1 with a separate relative bias in each layer."""
    own = {"activation": "gelu_tanh", "tied_embeddings": False, "relative_per_layer": True}
    return _family(vocab_size, d_model, num_heads, d_ff, num_layers, **(own | options))


def _family(vocab_size: int, *shape: int, **options: Any) -> EncoderDecoderConfig:
    """Common options: relative positions, unscaled scores, RMS norms, no biases, T5's tokens."""
    common: dict[str, Any] = {
        "head_dim": 64,
        "position": "relative",
        "scale": 1.0,
        "shared_embeddings": True,
        "stop_tokens": (1,),
        "pad_token": 0,
    }
    return EncoderDecoderConfig(vocab_size, vocab_size, *shape, **(common | options))
