"""Whole models: compositions of blocks, each with one frozen configuration."""

from ..deprecation import old_names
from .cached import CachedModel
from .classification import ClassificationHead, ClassifierConfig, classification_loss
from .classifier import EncoderClassifier
from .compare import Comparison, ComparisonTable, compare_generation, plot_comparison
from .composition import Composition, LayerParts, composed, composition_of, parameters_by_name
from .config import ComposedConfig, DecoderOnlyConfig, EncoderConfig, EncoderDecoderConfig, ModelConfig
from .decoder_only import DecoderOnlyTransformer
from .encoder import EncoderTransformer
from .encoder_decoder import EncoderDecoderTransformer
from .keywords import OLD_KEYWORDS
from .options import LayerOptions
from .outputs import ModelOutput
from .parts import FULL, SLIDING, AttentionConfig, FeedForwardConfig, NormConfig, PositionConfig
from .pooling import mean_pooled, pooled
from .t5 import UMT5Config, t5_config, t5_v1_1_config, umt5_config
from .tokens import InputPositions, LanguageHead, TokenEmbedding
from .umt5 import UMT5Cache, UMT5Model, init_cache

__all__ = [
    "FULL",
    "SLIDING",
    "AttentionConfig",
    "CachedModel",
    "ClassificationHead",
    "ClassifierConfig",
    "Comparison",
    "ComparisonTable",
    "ComposedConfig",
    "Composition",
    "DecoderOnlyConfig",
    "DecoderOnlyTransformer",
    "EncoderClassifier",
    "EncoderConfig",
    "EncoderDecoderConfig",
    "EncoderDecoderTransformer",
    "EncoderTransformer",
    "FeedForwardConfig",
    "InputPositions",
    "LanguageHead",
    "LayerOptions",
    "LayerParts",
    "ModelConfig",
    "ModelOutput",
    "NormConfig",
    "PositionConfig",
    "TokenEmbedding",
    "UMT5Cache",
    "UMT5Config",
    "UMT5Model",
    "classification_loss",
    "compare_generation",
    "composed",
    "composition_of",
    "init_cache",
    "mean_pooled",
    "parameters_by_name",
    "plot_comparison",
    "pooled",
    "t5_config",
    "t5_v1_1_config",
    "umt5_config",
]

__getattr__ = old_names(__name__, OLD_KEYWORDS)
