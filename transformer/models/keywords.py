"""Options of whole models as keywords, for type checkers; the configurations say what they mean, and have the defaults.

A test holds each class to the fields of its configuration.
"""

from typing import TypedDict

from ..positions import RotaryScaling
from .config import AttentionKind, FeedForwardKind, NormKind, NormPlacement, PositionKind


class LayerKeywords(TypedDict, total=False):
    """Those of `LayerOptions`."""

    attention: AttentionKind
    num_groups: int | None
    head_dim: int | None
    attention_bias: bool
    out_bias: bool | None
    qk_norm: bool
    scale: float | None
    softcap: float | None

    window_size: int | None
    num_sinks: int
    layer_pattern: str | None

    position: PositionKind
    max_length: int | None
    context_length: int | None
    rotary_base: float
    rotary_dim: int | None
    rotary_interleaved: bool
    rotary_scaling: RotaryScaling | None
    relative_buckets: int
    relative_max_distance: int
    relative_per_layer: bool

    norm: NormKind
    norm_eps: float
    norm_bias: bool
    norm_unit_offset: bool
    norm_placement: NormPlacement

    feed_forward: FeedForwardKind
    activation: str
    feed_forward_bias: bool

    dropout: float
    tied_embeddings: bool
    embedding_scale: float
    logit_scale: float
    logit_softcap: float | None

    stop_tokens: tuple[int, ...]
    pad_token: int | None


class DecoderOnlyKeywords(LayerKeywords, total=False):
    """Those of `DecoderOnlyConfig` beside the model's shape."""

    start_token: int | None
    has_head: bool


class EncoderDecoderKeywords(LayerKeywords, total=False):
    """Those of `EncoderDecoderConfig` beside the model's shape."""

    num_decoder_layers: int | None
    shared_embeddings: bool
    start_token: int


class EncoderKeywords(LayerKeywords, total=False):
    """Those of `EncoderConfig` beside the model's shape."""

    num_token_types: int
    embedding_norm: bool
