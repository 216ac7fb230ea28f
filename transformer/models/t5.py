"""Configurations of T5 and related models, by those of the encoder-decoder."""

from dataclasses import dataclass, fields
from typing import Any

from ..signatures import arguments_of
from .config import EncoderDecoderConfig, EncoderDecoderOptions, ModelConfig
from .options import OneVocabulary


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


@dataclass(frozen=True, kw_only=True)
class UMT5Config:
    """The shape of a UMT5; the defaults are those of google/umt5-small.

    Raises ConfigurationError, naming the field, for anything that cannot work.
    """

    vocab_size: int = 256384
    d_model: int = 512
    num_heads: int = 6
    head_dim: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_decoder_layers: int | None = None
    relative_buckets: int = 32
    relative_max_distance: int = 128
    norm_eps: float = 1e-6
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.encoder_decoder()

    @classmethod
    def small(cls) -> "UMT5Config":
        """google/umt5-small."""
        return cls()

    @classmethod
    def base(cls) -> "UMT5Config":
        """google/umt5-base."""
        return cls(d_model=768, num_heads=12, d_ff=2048, num_layers=12)

    @classmethod
    def xl(cls) -> "UMT5Config":
        """google/umt5-xl."""
        return cls(d_model=2048, num_heads=32, d_ff=5120, num_layers=24)

    @classmethod
    def xxl(cls) -> "UMT5Config":
        """google/umt5-xxl."""
        return cls(d_model=4096, num_heads=64, d_ff=10240, num_layers=24)

    def encoder_decoder(self) -> EncoderDecoderConfig:
        """The same as a configuration of the encoder-decoder, with the options that all UMT5 models share."""
        return umt5_config(**{each.name: getattr(self, each.name) for each in fields(self)})
