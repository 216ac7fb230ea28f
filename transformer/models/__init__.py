"""Whole models: compositions of blocks, each with one frozen configuration."""

from .cached import CachedModel
from .compare import Comparison, ComparisonTable, compare_generation, plot_comparison
from .config import FULL, SLIDING, DecoderOnlyConfig, EncoderDecoderConfig, LayerOptions
from .decoder_only import DecoderOnlyTransformer
from .encoder_decoder import EncoderDecoderTransformer
from .t5 import t5_config, t5_v1_1_config, umt5_config
from .umt5 import UMT5Cache, UMT5Config, UMT5Model, init_cache

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
    "UMT5Cache",
    "UMT5Config",
    "UMT5Model",
    "compare_generation",
    "init_cache",
    "plot_comparison",
    "t5_config",
    "t5_v1_1_config",
    "umt5_config",
]
