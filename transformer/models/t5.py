"""T5 and its kin as configurations of the encoder-decoder."""

from typing_extensions import Unpack

from .config import EncoderDecoderConfig
from .keywords import EncoderDecoderKeywords


def t5_config(
    vocab_size: int,
    d_model: int,
    num_heads: int,
    d_ff: int,
    num_layers: int,
    **options: Unpack[EncoderDecoderKeywords],
) -> EncoderDecoderConfig:
    """T5 as first published (arXiv 1910.10683): ReLU, and one table for source, target and head.

    What the head reads is multiplied by `d_model ** -0.5`. `options` are those of `EncoderDecoderConfig`; `head_dim` is
    64 where none is given.
    """
    own: EncoderDecoderKeywords = {"feed_forward": "plain", "activation": "relu", "logit_scale": d_model**-0.5}
    return _family(vocab_size, d_model, num_heads, d_ff, num_layers, own | options)


def t5_v1_1_config(
    vocab_size: int,
    d_model: int,
    num_heads: int,
    d_ff: int,
    num_layers: int,
    **options: Unpack[EncoderDecoderKeywords],
) -> EncoderDecoderConfig:
    """T5 version 1.1, and mT5 (arXiv 2010.11934): gated GELU, and a head of its own that nothing scales."""
    own: EncoderDecoderKeywords = {"activation": "gelu_tanh", "tied_embeddings": False}
    return _family(vocab_size, d_model, num_heads, d_ff, num_layers, own | options)


def umt5_config(
    vocab_size: int,
    d_model: int,
    num_heads: int,
    d_ff: int,
    num_layers: int,
    **options: Unpack[EncoderDecoderKeywords],
) -> EncoderDecoderConfig:
    """UMT5 (arXiv 2304.09151): T5 version 1.1 with a relative bias of its own in each layer."""
    own: EncoderDecoderKeywords = {"relative_per_layer": True}
    return t5_v1_1_config(vocab_size, d_model, num_heads, d_ff, num_layers, **(own | options))


def _family(
    vocab_size: int, d_model: int, num_heads: int, d_ff: int, num_layers: int, options: EncoderDecoderKeywords
) -> EncoderDecoderConfig:
    """What all have in common: relative positions, scores that nothing scales, RMS norms, no biases, T5's tokens."""
    common: EncoderDecoderKeywords = {
        "head_dim": 64,
        "position": "relative",
        "scale": 1.0,
        "shared_embeddings": True,
        "stop_tokens": (1,),
        "pad_token": 0,
    }
    return EncoderDecoderConfig(vocab_size, vocab_size, d_model, num_heads, d_ff, num_layers, **(common | options))
