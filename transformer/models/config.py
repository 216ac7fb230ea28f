"""Configurations: what a whole model is built from, as one frozen value of plain numbers and words."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, get_args

import torch

from ..blocks import ACTIVATIONS, layer_kinds
from ..cache import LayerPlan
from ..errors import MAX_LAYERS, MAX_SIZE, ConfigurationError, require_count, require_flag, require_number
from ..generation import GenerationKeywords
from ..positions import RotaryScaling

AttentionKind = Literal["mha", "mqa", "gqa"]
PositionKind = Literal["rotary", "alibi", "relative", "learned", "sinusoidal", "none"]
NormKind = Literal["rms", "layer"]
FeedForwardKind = Literal["plain", "gated"]
NormPlacement = Literal["before", "after", "both"]

SLIDING, FULL = "sliding", "full"
"""The words of a layer pattern."""


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """What the layers of a model have in common; every option may be left out.

    Attention: `attention` with `num_groups` (of "gqa"), `head_dim` (by default `d_model // num_heads`), biases, a norm
    of queries and keys, the factor and the soft cap of scores. Windows: `layer_pattern` repeats the words "sliding" and
    "full" over the (decoder's) layers; by default all slide where there is a `window_size`. Positions: "learned" needs
    `max_length`, "relative" is T5's bias, shared by all layers unless `relative_per_layer`;
    `context_length` is the length that the model was trained at, which bounds nothing here. Norms stand "before" a
    branch, "after" the sum, or on "both" sides. Generation ends rows with `stop_tokens` and fills them with `pad_token`
    where a call gives no others.
    """

    attention: AttentionKind = "mha"
    num_groups: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    out_bias: bool | None = None
    qk_norm: bool = False
    scale: float | None = None
    softcap: float | None = None

    window_size: int | None = None
    num_sinks: int = 0
    layer_pattern: str | None = None

    position: PositionKind = "rotary"
    max_length: int | None = None
    context_length: int | None = None
    rotary_base: float = 10000.0
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    rotary_scaling: RotaryScaling | None = None
    relative_buckets: int = 32
    relative_max_distance: int = 128
    relative_per_layer: bool = False

    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    norm_bias: bool = True
    norm_unit_offset: bool = False
    norm_placement: NormPlacement = "before"

    feed_forward: FeedForwardKind = "gated"
    activation: str = "silu"
    feed_forward_bias: bool = False

    dropout: float = 0.0
    tied_embeddings: bool = True
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    stop_tokens: tuple[int, ...] = ()
    pad_token: int | None = None

    model_type: ClassVar[str] = "modular_attention"
    """What wrappers for transformers' models ask a configuration for; no field."""

    def kinds(self, num_layers: int) -> tuple[str, ...]:
        """The kind of each layer, "sliding" or "full"."""
        if self.layer_pattern is not None:
            return layer_kinds(self.layer_pattern, num_layers)
        return (FULL if self.window_size is None else SLIDING,) * num_layers

    def plans(self, num_heads: int, d_model: int, num_layers: int) -> list[LayerPlan]:
        """What the memory of each layer's own cache goes by, in the default dtype."""
        heads = {"mha": num_heads, "mqa": 1, "gqa": self.num_groups or 1}[self.attention]
        plan = LayerPlan(heads, self.head_dim or d_model // num_heads, torch.get_default_dtype())
        sliding = replace(plan, window_size=self.window_size, num_sinks=self.num_sinks)
        return [sliding if kind == SLIDING else plan for kind in self.kinds(num_layers)]

    def generating(self, options: GenerationKeywords) -> GenerationKeywords:
        """The options of a generation, with the model's own stop and pad tokens where they give no others."""
        return {"stop_tokens": self.stop_tokens, "pad_token": self.pad_token, **options}

    def to_dict(self) -> dict[str, Any]:
        """Every field by name; `type(config)(**config.to_dict())` equals the config."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class DecoderOnlyConfig(LayerOptions):
    """A decoder-only model: `vocab_size`, width, heads, feed-forward width, layers, and `LayerOptions`.

    Texts of some models begin with a `start_token`; nothing puts it there by itself. `has_head=False`: no head, as in
    embedding models: the forward gives what a head would read, and nothing is generated.

    Raises ConfigurationError, naming the field, for anything that cannot work.
    """

    vocab_size: int
    d_model: int
    num_heads: int
    d_ff: int
    num_layers: int
    start_token: int | None = field(default=None, kw_only=True)
    has_head: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        _check_counts(self, "vocab_size", "d_model", "num_heads", "d_ff", "num_layers")
        _check_options(self, self.num_layers)

    def layer_plans(self) -> list[LayerPlan]:
        """What `cache_bytes` counts of a model of this configuration."""
        return self.plans(self.num_heads, self.d_model, self.num_layers)


@dataclass(frozen=True)
class EncoderDecoderConfig(LayerOptions):
    """An encoder-decoder model over two vocabularies; windows are the decoder's.

    `src_vocab_size=None`: sources come as vectors `[B, S, d_model]`. `num_layers` counts the encoder's, and the
    decoder's too unless `num_decoder_layers` is given. `shared_embeddings`: one table for source and target. Targets
    begin with `start_token`.

    Raises ConfigurationError, naming the field, for anything that cannot work.
    """

    src_vocab_size: int | None
    tgt_vocab_size: int
    d_model: int
    num_heads: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int | None = field(default=None, kw_only=True)
    shared_embeddings: bool = field(default=False, kw_only=True)
    start_token: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        _check_counts(self, "tgt_vocab_size", "d_model", "num_heads", "d_ff", "num_layers")
        for name in ("src_vocab_size", "num_decoder_layers"):
            if getattr(self, name) is not None:
                _check_counts(self, name)
        if self.shared_embeddings and self.src_vocab_size != self.tgt_vocab_size:
            raise ConfigurationError(
                f"shared_embeddings: expected src_vocab_size and tgt_vocab_size to be one number, "
                f"got {self.src_vocab_size} and {self.tgt_vocab_size}"
            )
        if type(self.start_token) is not int or not 0 <= self.start_token < self.tgt_vocab_size:
            raise ConfigurationError(
                f"start_token: expected an id from 0 to {self.tgt_vocab_size - 1}, got {self.start_token!r}"
            )
        _check_options(self, self.decoder_layers)

    def layer_plans(self) -> list[LayerPlan]:
        """What `cache_bytes` counts of a model of this configuration: the source, which each layer reads, included."""
        own = self.plans(self.num_heads, self.d_model, self.decoder_layers)
        return own + [replace(plan, window_size=None, num_sinks=0, kind="cross") for plan in own]

    @property
    def decoder_layers(self) -> int:
        """How many layers the decoder has."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers


@dataclass(frozen=True)
class EncoderConfig(LayerOptions):
    """A model that reads and does not write: `vocab_size`, width, heads, feed-forward width, layers, `LayerOptions`.

    `num_token_types`: kinds of tokens, such as those of a first and a second sentence, each with a vector that is added
    to its tokens; 0 for none. `embedding_norm`: a norm before the first block. Every token sees every other one.

    Raises ConfigurationError, naming the field, for anything that cannot work.
    """

    vocab_size: int
    d_model: int
    num_heads: int
    d_ff: int
    num_layers: int
    num_token_types: int = field(default=0, kw_only=True)
    embedding_norm: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        _check_counts(self, "vocab_size", "d_model", "num_heads", "d_ff", "num_layers")
        if type(self.num_token_types) is not int or self.num_token_types < 0:
            raise ConfigurationError(
                f"num_token_types: expected a whole number of at least 0, got {self.num_token_types!r}"
            )
        if self.window_size is not None:
            raise ConfigurationError(f"window_size: expected None in an encoder, got {self.window_size!r}")
        _check_options(self, self.num_layers)


def _check_counts(config: object, *names: str) -> None:
    for name in names:
        most = MAX_LAYERS if name in ("num_layers", "num_decoder_layers") else MAX_SIZE
        require_count(name, getattr(config, name), most=most)


def _check_options(config: DecoderOnlyConfig | EncoderDecoderConfig | EncoderConfig, num_layers: int) -> None:
    """What attention modules, norms and positions check themselves is left to them."""
    words = {
        "attention": get_args(AttentionKind),
        "position": get_args(PositionKind),
        "norm": get_args(NormKind),
        "feed_forward": get_args(FeedForwardKind),
        "norm_placement": get_args(NormPlacement),
        "activation": tuple(sorted(ACTIVATIONS)),
    }
    for name, known in words.items():
        word = getattr(config, name)
        if not isinstance(word, str) or word not in known:
            raise ConfigurationError(f"{name}: expected one of {known}, got {word!r:.200}")
    for option in fields(config):
        flag = getattr(config, option.name)
        if option.type is bool or (option.type == bool | None and flag is not None):
            require_flag(option.name, flag)
    for name in ("num_groups", "head_dim", "window_size", "max_length", "context_length", "rotary_dim"):
        if getattr(config, name) is not None:
            _check_counts(config, name)
    if (config.num_groups is None) == (config.attention == "gqa"):
        raise ConfigurationError(
            f'num_groups: expected a number with attention="gqa", and None else, got {config.num_groups} '
            f"with {config.attention!r}"
        )
    if config.num_groups is not None and config.num_heads % config.num_groups:
        raise ConfigurationError(f"num_groups: expected a divisor of {config.num_heads}, got {config.num_groups}")
    if config.head_dim is None and config.d_model % config.num_heads:
        raise ConfigurationError(
            f"d_model: expected a multiple of num_heads={config.num_heads}, got {config.d_model}; or give head_dim"
        )
    if not _is_pattern(config.layer_pattern):
        raise ConfigurationError(f"layer_pattern: expected None or words, got {config.layer_pattern!r:.200}")
    kinds = set(config.kinds(num_layers))
    if not kinds <= {SLIDING, FULL}:
        raise ConfigurationError(f"layer_pattern: expected the words sliding and full, got {config.layer_pattern!r}")
    if (SLIDING in kinds) != (config.window_size is not None):
        raise ConfigurationError(
            f"window_size: expected a number where layers slide, and None where none does, got {config.window_size} "
            f"with {sorted(kinds)}"
        )
    require_count("num_sinks", config.num_sinks, least=0)
    if config.num_sinks and config.window_size is None:
        raise ConfigurationError(f"num_sinks: expected 0 without a window_size, got {config.num_sinks!r}")
    if (config.position == "learned") != (config.max_length is not None):
        raise ConfigurationError(
            f'max_length: expected a number with position="learned", and None else, got {config.max_length} with '
            f"{config.position!r}"
        )
    _check_numbers(config)
    tokens = config.stop_tokens if config.pad_token is None else (*config.stop_tokens, config.pad_token)
    if type(config.stop_tokens) is not tuple or not all(type(token) is int and token >= 0 for token in tokens):
        raise ConfigurationError(
            f"stop_tokens, pad_token: expected a tuple of ids from 0 on and an id or None, got {config.stop_tokens!r} "
            f"and {config.pad_token!r}"
        )


def _is_pattern(pattern: object) -> bool:
    return pattern is None or (isinstance(pattern, str) and bool(pattern.split()))


def _check_numbers(config: LayerOptions) -> None:
    require_number("dropout", config.dropout, least=0.0, below=1.0)
    require_number("norm_eps", config.norm_eps, least=0.0)
    for name in ("embedding_scale", "logit_scale", "rotary_base", "scale", "softcap", "logit_softcap"):
        value = getattr(config, name)
        if value is not None or name not in ("scale", "softcap", "logit_softcap"):
            require_number(name, value, above=0.0)
