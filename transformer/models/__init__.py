"""Whole models: compositions of blocks, each with one frozen configuration."""

from .cached import CachedModel
from .compare import Comparison, ComparisonTable, compare_generation, plot_comparison
from .config import FULL, SLIDING, DecoderOnlyConfig, EncoderConfig, EncoderDecoderConfig, LayerOptions
from .decoder_only import DecoderOnlyTransformer
from .encoder import EncoderTransformer, mean_pooled
from .encoder_decoder import EncoderDecoderTransformer
from .keywords import DecoderOnlyKeywords, EncoderDecoderKeywords, EncoderKeywords, LayerKeywords
from .outputs import ModelOutput
from .t5 import t5_config, t5_v1_1_config, umt5_config
from .umt5 import UMT5Cache, UMT5Config, UMT5Model, init_cache

__all__ = [
    "FULL",
    "SLIDING",
    "CachedModel",
    "Comparison",
    "ComparisonTable",
    "DecoderOnlyConfig",
    "DecoderOnlyKeywords",
    "DecoderOnlyTransformer",
    "EncoderConfig",
    "EncoderDecoderConfig",
    "EncoderDecoderKeywords",
    "EncoderDecoderTransformer",
    "EncoderKeywords",
    "EncoderTransformer",
    "LayerKeywords",
    "LayerOptions",
    "ModelOutput",
    "UMT5Cache",
    "UMT5Config",
    "UMT5Model",
    "compare_generation",
    "init_cache",
    "mean_pooled",
    "plot_comparison",
    "t5_config",
    "t5_v1_1_config",
    "umt5_config",
]
