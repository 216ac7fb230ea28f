"""Parts of a model's configuration: its attention, positions, norms and feed-forward networks, one frozen value each.

A configuration of a model inherits from its parts, so each option stands in one place, and a function that needs the
norms alone takes a `NormConfig`: the part by itself or a whole configuration.
"""

from dataclasses import InitVar, dataclass, fields
from typing import Any, Literal, get_args, get_origin

from ..attention.option_checks import key_value_heads
from ..blocks import ACTIVATIONS, layer_kinds
from ..errors import ConfigurationError, require_count, require_flag, require_number, shown
from ..positions import RotaryScaling

AttentionKind = Literal["mha", "mqa", "gqa"]
PositionKind = Literal["rotary", "alibi", "relative", "learned", "sinusoidal", "none"]
NormKind = Literal["rms", "layer"]
FeedForwardKind = Literal["plain", "gated", "mixture"]
NormPlacement = Literal["before", "after", "both", "branch"]

SLIDING, FULL = "sliding", "full"
"""The words of a layer pattern."""

INSIDE_ATTENTION: tuple[PositionKind, ...] = ("rotary", "alibi", "relative")
"""The kinds of positions that a layer has, or has not, by itself."""


@dataclass(frozen=True, kw_only=True)
class ConfigPart:
    """Base of parts and of whole configurations: fields by name, each checked when the value is built."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises ConfigurationError, naming the field, for anything that cannot work; each part adds its own checks.

        What attention modules, norms and positions check themselves is left to them.
        """
        for option in fields(self):
            value = getattr(self, option.name)
            words = get_args(option.type) if get_origin(option.type) is Literal else ()
            if words and not (isinstance(value, str) and value in words):
                raise ConfigurationError(f"{option.name}: expected one of {words}, got {shown(value)}")
            if option.type is bool or (option.type == bool | None and value is not None):
                require_flag(option.name, value)

    def to_dict(self) -> dict[str, Any]:
        """Every field by name; `type(config)(**config.to_dict())` equals the config."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def _check_given(self, *names: str) -> None:
        """Raises ConfigurationError for a size that is neither None nor a whole number of at least 1."""
        for name in names:
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))

    def _check_positive(self, *names: str, or_none: bool = False) -> None:
        for name in names:
            if getattr(self, name) is not None or not or_none:
                require_number(name, getattr(self, name), above=0.0)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(ConfigPart):
    """The attention of all layers: heads, biases, scores, and windows.

    `num_groups` is the number of key/value heads of "gqa", and `num_kv_heads` another name of it: give exactly one of
    the two, and read `num_groups`. `head_dim` is by default `d_model // num_heads`, `out_bias` as `attention_bias`.
    `qk_norm`: a norm of queries and keys, of each head, or of all heads together unless `qk_norm_per_head`. `scale` is
    the factor of scores, by default `head_dim ** -0.5`, `softcap` their soft cap, `sink_logits` a learned logit of each
    head beside them. `layer_pattern` repeats the words "sliding" and "full" over the (decoder's) layers; by default all
    slide where there is a `window_size`.
    """

    attention: AttentionKind = "mha"
    num_groups: int | None = None
    num_kv_heads: InitVar[int | None] = None
    head_dim: int | None = None
    attention_bias: bool = False
    out_bias: bool | None = None
    qk_norm: bool = False
    qk_norm_per_head: bool = True
    scale: float | None = None
    softcap: float | None = None
    sink_logits: bool = False

    window_size: int | None = None
    num_sinks: int = 0
    layer_pattern: str | None = None

    def __post_init__(self, num_kv_heads: int | None) -> None:
        if num_kv_heads is not None:
            object.__setattr__(self, "num_groups", key_value_heads(self.num_groups, num_kv_heads))
        super().__post_init__()

    def check(self) -> None:
        super().check()
        self._check_given("num_groups", "head_dim", "window_size")
        self._check_positive("scale", "softcap", or_none=True)
        if (self.num_groups is None) == (self.attention == "gqa"):
            raise ConfigurationError(
                'num_groups, num_kv_heads: expected a number by one of these names with attention="gqa", and None '
                f"else, got {self.num_groups} with {self.attention!r}"
            )
        pattern: object = self.layer_pattern
        words = pattern.split() if isinstance(pattern, str) else []
        if pattern is not None and not (words and {SLIDING, FULL}.issuperset(words)):
            raise ConfigurationError(
                f'layer_pattern: expected None, or a text of the words sliding and full, such as "sliding full", '
                f"got {shown(pattern)}"
            )
        require_count("num_sinks", self.num_sinks, least=0)
        if self.num_sinks and self.window_size is None:
            raise ConfigurationError(f"num_sinks: expected 0 without a window_size, got {self.num_sinks!r}")

    def kinds(self, num_layers: int) -> tuple[str, ...]:
        """The kind of each layer, "sliding" or "full"."""
        if self.layer_pattern is not None:
            return layer_kinds(self.layer_pattern, num_layers)
        return (FULL if self.window_size is None else SLIDING,) * num_layers


@dataclass(frozen=True, kw_only=True)
class ContextConfig(ConfigPart):
    """The length at which a model was trained: `context_length`; it is no limit here."""

    context_length: int | None = None

    def check(self) -> None:
        super().check()
        self._check_given("context_length")


@dataclass(frozen=True, kw_only=True)
class PositionConfig(ContextConfig):
    """The positions: rotary, ALiBi, relative, or added to embeddings.

    "learned" needs `max_length`; its table has `position_offset` rows before that of position 0, which no token takes
    (RoBERTa, OPT: 2). "sinusoidal" has all sines before all cosines where `sinusoidal_interleaved=False`. "relative" is
    T5's bias, shared by all layers unless `relative_per_layer`.
    `position_pattern` repeats the word of `position` and "none" over the (decoder's) layers, such as "rotary rotary
    rotary none" (NoPE, arXiv 2305.19466); by default all layers have positions. With `rotary_sliding_base` the layers
    that slide have this base instead of `rotary_base`, and no scaling (Gemma 3, arXiv 2503.19786).
    `context_length` is the length at which the model was trained; it is no limit here.
    """

    position: PositionKind = "rotary"
    position_pattern: str | None = None
    max_length: int | None = None
    position_offset: int = 0
    rotary_base: float = 10000.0
    rotary_sliding_base: float | None = None
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    rotary_scaling: RotaryScaling | None = None
    relative_buckets: int = 32
    relative_max_distance: int = 128
    relative_per_layer: bool = False
    sinusoidal_interleaved: bool = True

    def check(self) -> None:
        super().check()
        self._check_given("max_length", "rotary_dim")
        require_count("position_offset", self.position_offset, least=0)
        self._check_positive("rotary_base")
        self._check_positive("rotary_sliding_base", or_none=True)
        pattern: object = self.position_pattern
        words = pattern.split() if isinstance(pattern, str) else []
        known = {self.position, "none"} if self.position in INSIDE_ATTENTION else set()
        if pattern is not None and not (words and known.issuperset(words)):
            raise ConfigurationError(
                "position_pattern: expected None, or a text of the word none and that of the position, one of "
                f"{INSIDE_ATTENTION}, got {shown(pattern)} with {self.position!r}"
            )
        if (self.position == "learned") != (self.max_length is not None):
            raise ConfigurationError(
                f'max_length: expected a number with position="learned", and None else, got {self.max_length} with '
                f"{self.position!r}"
            )
        if self.position_offset and self.position != "learned":
            raise ConfigurationError(
                f'position_offset: expected 0 without position="learned", got {self.position_offset} with '
                f"{self.position!r}"
            )

    def positions(self, num_layers: int) -> tuple[str, ...]:
        """The kind of the positions of each layer."""
        if self.position_pattern is not None:
            return layer_kinds(self.position_pattern, num_layers)
        return (self.position,) * num_layers


@dataclass(frozen=True, kw_only=True)
class NormConfig(ConfigPart):
    """The norms: before a branch, after the sum, on both sides of the branch, or on the output of the branch alone.

    `norm_unit_offset` adds 1 to their weights.
    """

    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    norm_bias: bool = True
    norm_unit_offset: bool = False
    norm_placement: NormPlacement = "before"

    def check(self) -> None:
        super().check()
        require_number("norm_eps", self.norm_eps, least=0.0)


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig(ConfigPart):
    """The feed-forward networks: plain, gated, or a mixture of gated experts, and their activation.

    `num_experts` and `experts_per_token` are those of a mixture, each of whose experts has the width `d_ff`.
    `normalize_routing_weights`: the weights of a token's experts sum to 1; else they are their probabilities among all
    experts.
    """

    feed_forward: FeedForwardKind = "gated"
    activation: str = "silu"
    feed_forward_bias: bool = False
    num_experts: int | None = None
    experts_per_token: int | None = None
    normalize_routing_weights: bool = True

    def check(self) -> None:
        super().check()
        self._check_given("num_experts", "experts_per_token")
        experts, chosen = self.num_experts, self.experts_per_token
        mixture = self.feed_forward == "mixture"
        if (experts is not None) != mixture or (chosen is not None) != mixture:
            raise ConfigurationError(
                'num_experts, experts_per_token: expected numbers with feed_forward="mixture", and None else, got '
                f"{experts} and {chosen} with {self.feed_forward!r}"
            )
        if experts is not None and chosen is not None and chosen > experts:
            raise ConfigurationError(f"experts_per_token: expected at most num_experts={experts}, got {chosen}")
        activation: object = self.activation
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise ConfigurationError(
                f"activation: expected one of {tuple(sorted(ACTIVATIONS))}, got {shown(activation)}"
            )
