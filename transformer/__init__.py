"""Attention modules for PyTorch with a built-in KV cache."""

from .attention import GroupQueryAttention, MultiHeadAttention, MultiQueryAttention
from .cache import KVCache, LayerCache, Step, cache_bytes
from .errors import AttentionError
from .generation import Batch, PrefixCache
from .models import DecoderOnlyTransformer, EncoderDecoderTransformer

__version__ = "0.2.0"

__all__ = [
    "AttentionError",
    "Batch",
    "DecoderOnlyTransformer",
    "EncoderDecoderTransformer",
    "GroupQueryAttention",
    "KVCache",
    "LayerCache",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "PrefixCache",
    "Step",
    "cache_bytes",
]
