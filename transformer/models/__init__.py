"""Whole models: compositions of blocks, each with one frozen configuration."""

from .cached import CachedModel
from .config import DecoderOnlyConfig, EncoderDecoderConfig, LayerOptions
from .decoder_only import DecoderOnlyTransformer
from .encoder_decoder import EncoderDecoderTransformer

__all__ = [
    "CachedModel",
    "DecoderOnlyConfig",
    "DecoderOnlyTransformer",
    "EncoderDecoderConfig",
    "EncoderDecoderTransformer",
    "LayerOptions",
]
