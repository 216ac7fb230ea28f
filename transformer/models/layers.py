"""Stacks of blocks, norms, positions and heads that a configuration describes."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from ..attention import Attention, AttentionKeywords, GroupQueryAttention, MultiHeadAttention, MultiQueryAttention
from ..blocks import (
    BlockStack,
    DecoderBlock,
    EncoderBlock,
    FeedForward,
    GatedFeedForward,
    LayerNorm,
    MixtureOfExperts,
    RMSNorm,
)
from ..positions import (
    AbsolutePositions,
    ALiBi,
    LearnedPositions,
    RelativePositionBias,
    RotaryEmbedding,
    Rotation,
    ScoreBias,
    SinusoidalPositions,
)
from .config import ModelConfig
from .parts import NormConfig, PositionConfig
from .tokens import InputPositions, LanguageHead, TokenEmbedding

PositionMaker = Callable[[], Rotation | ScoreBias | None]
"""A function that returns the position scheme of the next layer."""


class Dropouts(NamedTuple):
    """Dropout of a block: of attention weights, of the outputs of branches, and of the hidden layer between them."""

    attention: float
    branches: float
    hidden: float


def decoder_stack(config: ModelConfig, *, reads_source: bool = False) -> BlockStack:
    """Causal blocks of the kinds that the patterns name, with cross-attention where `reads_source`, and a last norm."""
    makers = PositionMakers()
    blocks = [
        decoder_block(
            layer,
            makers.of(layer),
            window_size=layer.window_size,
            qk_norm=layer if layer.qk_norm else None,
            reads_source=reads_source,
        )
        for layer in config.each_layer()
    ]
    return BlockStack(blocks, _last_norm(config))


def decoder_block(
    config: ModelConfig,
    position: PositionMaker,
    *,
    window_size: int | None,
    qk_norm: NormConfig | None,
    dropouts: Dropouts | None = None,
    reads_source: bool = False,
) -> DecoderBlock:
    """One causal block with a window or without one, and with a norm of queries and keys or without one."""
    dropouts = dropouts or Dropouts(config.dropout, config.dropout, config.dropout)
    cross_attention = (
        _attention(config, causal=False, dropout=config.dropout, qk_norm=qk_norm) if reads_source else None
    )
    return DecoderBlock(
        _attention(
            config,
            causal=True,
            dropout=dropouts.attention,
            qk_norm=qk_norm,
            position=position(),
            window_size=window_size,
        ),
        _feed_forward(config, dropouts.hidden),
        norm_maker(config),
        cross_attention=cross_attention,
        placement=config.norm_placement,
        dropout=dropouts.branches,
        residual=config.residual,
        residual_scale=config.residual_scale,
    )


def encoder_stack(config: ModelConfig) -> BlockStack:
    """Blocks without causal order, of the kinds that the patterns of an encoder name, and a last norm."""
    makers = PositionMakers(bidirectional=True)
    blocks = [
        EncoderBlock(
            _attention(
                layer,
                causal=False,
                dropout=config.dropout,
                qk_norm=layer if layer.qk_norm else None,
                position=makers.of(layer)(),
                window_size=layer.window_size,
            ),
            _feed_forward(config, config.dropout),
            norm_maker(config),
            placement=config.norm_placement,
            dropout=config.dropout,
            residual_scale=config.residual_scale,
        )
        for layer in config.encoder_layers()
    ]
    return BlockStack(blocks, _last_norm(config))


def language_head(config: ModelConfig, vocab_size: int, embedding: TokenEmbedding) -> LanguageHead:
    """The language head, tied to `embedding` where the configuration says so."""
    return LanguageHead(
        config.d_model,
        vocab_size,
        bias=config.head_bias,
        tied=embedding if config.tied_embeddings else None,
        scale=config.logit_scale,
        softcap=config.logit_softcap,
    )


def input_positions(config: ModelConfig) -> InputPositions:
    """Input of the first block: positions that are added to embeddings, and a norm, where the model has them."""
    norm = norm_maker(config)(config.d_model) if config.embedding_norm else None
    return InputPositions(_absolute_positions(config), config.dropout, norm)


def _absolute_positions(config: ModelConfig) -> AbsolutePositions | None:
    """Positions that are added to embeddings; None where positions act inside the attention."""
    if config.position == "learned" and config.max_length is not None:
        return LearnedPositions(config.max_length, config.d_model, config.position_offset)
    if config.position == "sinusoidal":
        return SinusoidalPositions(config.d_model, interleaved=config.sinusoidal_interleaved)
    return None


def norm_maker(config: NormConfig) -> Callable[[int], nn.Module]:
    """A function that makes the model's norm over a width."""
    if config.norm == "rms":
        return lambda dim: RMSNorm(dim, config.norm_eps, unit_offset=config.norm_unit_offset)
    return lambda dim: LayerNorm(dim, config.norm_eps, bias=config.norm_bias, unit_offset=config.norm_unit_offset)


def _last_norm(config: ModelConfig) -> nn.Module | None:
    return None if config.norm_placement == "after" else norm_maker(config)(config.d_model)


def _attention(
    config: ModelConfig,
    *,
    causal: bool,
    dropout: float,
    qk_norm: NormConfig | None,
    position: Rotation | ScoreBias | None = None,
    window_size: int | None = None,
) -> Attention:
    options: AttentionKeywords = {
        "head_dim": config.head_dim,
        "bias": config.attention_bias,
        "out_bias": config.out_bias,
        "dropout": dropout,
        "position": position,
        "window_size": window_size,
        "num_sinks": 0 if window_size is None else config.num_sinks,
        "qk_norm": None if qk_norm is None else norm_maker(qk_norm),
        "qk_norm_per_head": config.qk_norm_per_head,
        "scale": config.scale,
        "softcap": config.softcap,
        "sink_logits": config.sink_logits,
    }
    if config.attention == "gqa":
        return GroupQueryAttention(config.d_model, config.num_heads, config.num_groups, causal, **options)
    kind = MultiHeadAttention if config.attention == "mha" else MultiQueryAttention
    return kind(config.d_model, config.num_heads, causal, **options)


def _feed_forward(config: ModelConfig, dropout: float) -> nn.Module:
    if config.num_experts is not None and config.experts_per_token is not None:
        return MixtureOfExperts(
            config.d_model,
            config.d_ff,
            config.num_experts,
            config.experts_per_token,
            config.activation,
            normalize_weights=config.normalize_routing_weights,
            bias=config.feed_forward_bias,
            dropout=dropout,
        )
    kind = GatedFeedForward if config.feed_forward == "gated" else FeedForward
    return kind(config.d_model, config.d_ff, config.activation, bias=config.feed_forward_bias, dropout=dropout)


def position_maker(config: ModelConfig, *, bidirectional: bool = False) -> PositionMaker:
    """A function that returns the position scheme of the next layer: the same object where layers share it."""
    if config.position == "relative" and config.relative_per_layer:
        return lambda: _relative(config, bidirectional)
    shared: Rotation | ScoreBias | None = None
    if config.position == "rotary":
        shared = RotaryEmbedding(
            config.head_dim or config.d_model // config.num_heads,
            config.rotary_base,
            rotary_dim=config.rotary_dim,
            interleaved=config.rotary_interleaved,
            scaling=config.rotary_scaling,
        )
    elif config.position == "alibi":
        shared = ALiBi(config.num_heads)
    elif config.position == "relative":
        shared = _relative(config, bidirectional)
    return lambda: shared


class PositionMakers:
    """Makers of positions: one for all layers whose options of positions are equal, so that they share one scheme."""

    def __init__(self, *, bidirectional: bool = False) -> None:
        self._bidirectional = bidirectional
        # A list, since a scaling of one's own need not be hashable.
        self._makers: list[tuple[object, PositionMaker]] = []

    def of(self, config: ModelConfig) -> PositionMaker:
        """The maker for a layer of these options."""
        wanted = config.part(PositionConfig), config.num_heads, config.head_dim
        for known, maker in self._makers:
            if known == wanted:
                return maker
        self._makers.append((wanted, position_maker(config, bidirectional=self._bidirectional)))
        return self._makers[-1][1]


def _relative(config: ModelConfig, bidirectional: bool) -> RelativePositionBias:
    return RelativePositionBias(config.num_heads, config.relative_buckets, config.relative_max_distance, bidirectional)
