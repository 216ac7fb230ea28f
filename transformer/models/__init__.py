"""Whole models: compositions of blocks, each with one frozen configuration."""

from .cached import CachedModel
from .compare import Comparison, ComparisonTable, compare_generation, plot_comparison
from .config import FULL, SLIDING, DecoderOnlyConfig, EncoderDecoderConfig, LayerOptions
from .decoder_only import DecoderOnlyTransformer
from .encoder_decoder import EncoderDecoderTransformer

__all__ = [
    "FULL",
    "SLIDING",
    "CachedModel",
    "Comparison",
    "ComparisonTable",
    "DecoderOnlyConfig",
    "DecoderOnlyTransformer",
    "EncoderDecoderConfig",
    "EncoderDecoderTransformer",
    "LayerOptions",
    "compare_generation",
    "plot_comparison",
]
