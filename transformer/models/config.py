"""Configurations of whole models: one frozen value of plain numbers and words for each kind of model."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from typing_extensions import Self

from ..cache import LayerPlan
from ..errors import MAX_LAYERS, ConfigurationError, require_count, shown
from .options import LayerOptions, OneVocabulary, TwoVocabularies
from .parts import FULL, SLIDING


@dataclass(frozen=True)
class ModelConfig(LayerOptions):
    """The shape of a model: its width, heads, feed-forward width and number of layers."""

    d_model: int
    num_heads: int
    d_ff: int
    num_layers: int

    @property
    def kv_heads(self) -> int:
        """How many key/value heads each layer has."""
        return {"mha": self.num_heads, "mqa": 1}.get(self.attention, self.num_groups or 1)

    def _check_sequential(self, model: str) -> None:
        """Raises ConfigurationError for a parallel residual connection, in models that have no such blocks."""
        if self.residual != "sequential":
            raise ConfigurationError(f'residual: expected "sequential" in {model}, got {self.residual!r}')

    @property
    def cached_layers(self) -> int:
        """How many layers may keep a cache of their own tokens: those that patterns are of."""
        return self.num_layers

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer that may keep a cache, "sliding" or "full"."""
        return self.kinds(self.cached_layers)

    def each_layer(self) -> list[Self]:
        """The options of each layer that may keep a cache, as of a model of this layer alone, without patterns."""
        kinds = list(zip(self.layer_kinds, self.positions(self.cached_layers), strict=True))
        made = {kind: replace(self, **self._of_layer(*kind)) for kind in dict.fromkeys(kinds)}
        return [made[kind] for kind in kinds]

    def encoder_layers(self) -> list[Self]:
        """The options of each layer of the encoder, in a model that has one."""
        return self.each_layer()

    def _of_layer(self, kind: str, position: str) -> dict[str, Any]:
        sliding = kind == SLIDING
        options: dict[str, Any] = {
            "num_layers": 1,
            "layer_pattern": None,
            "window_size": self.window_size if sliding else None,
            "num_sinks": self.num_sinks if sliding else 0,
            "position": position,
            "position_pattern": None,
            "rotary_sliding_base": None,
        }
        if sliding and self.rotary_sliding_base is not None:
            options |= {"rotary_base": self.rotary_sliding_base, "rotary_scaling": None}
        return options

    def check(self) -> None:
        super().check()
        for name in ("d_model", "num_heads", "d_ff"):
            require_count(name, getattr(self, name))
        require_count("num_layers", self.num_layers, most=MAX_LAYERS)
        if self.num_heads % self.kv_heads:
            raise ConfigurationError(f"num_groups: expected a divisor of {self.num_heads}, got {self.num_groups}")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ConfigurationError(
                f"d_model: expected a multiple of num_heads={self.num_heads}, got {self.d_model}; or give head_dim"
            )
        if (SLIDING in self.layer_kinds) != (self.window_size is not None):
            raise ConfigurationError(
                "window_size: expected a number where layers slide, and None where none does, got "
                f"{self.window_size} with {sorted(set(self.layer_kinds))}"
            )
        if self.rotary_sliding_base is not None and (self.position != "rotary" or self.window_size is None):
            raise ConfigurationError(
                "rotary_sliding_base: expected None without layers that slide and have rotary positions, got "
                f"{self.rotary_sliding_base} with window_size={self.window_size} and {self.position!r}"
            )
        # A pattern of more words than layers.
        self.positions(self.cached_layers)

    def own_plans(self) -> list[LayerPlan]:
        """The shape of each layer's cache of its own tokens, in the default dtype."""
        plan = LayerPlan(self.kv_heads, self.head_dim or self.d_model // self.num_heads, torch.get_default_dtype())
        sliding = replace(plan, window_size=self.window_size, num_sinks=self.num_sinks)
        return [sliding if kind == SLIDING else plan for kind in self.layer_kinds]


@dataclass(frozen=True)
class DecoderOnlyOptions(OneVocabulary):
    """Options of a decoder-only model, whatever its layers are.

    `start_token`: the token that texts of some models begin with; nothing puts it there by itself. `has_head=False`: no
    head, as in embedding models: the forward gives what a head would read, and nothing is generated.
    """

    start_token: int | None = field(default=None, kw_only=True)
    has_head: bool = field(default=True, kw_only=True)


@dataclass(frozen=True)
class ComposedConfig(DecoderOnlyOptions):
    """A decoder-only model that was composed by parts: what is not said by its modules, and its sizes.

    `DecoderOnlyTransformer.from_parts` makes it. `stop_tokens`, `pad_token`, `start_token` and `context_length` may be
    changed: `model.config = dataclasses.replace(model.config, stop_tokens=(2,))`. The other fields describe the parts.
    """

    d_model: int
    num_layers: int

    def check(self) -> None:
        super().check()
        require_count("d_model", self.d_model)
        require_count("num_layers", self.num_layers, most=MAX_LAYERS)


@dataclass(frozen=True)
class DecoderOnlyConfig(ModelConfig, DecoderOnlyOptions):
    """A decoder-only model: `vocab_size`, width, heads, feed-forward width, layers, and `LayerOptions`.

    `start_token`: the token that texts of some models begin with; nothing puts it there by itself. `has_head=False`: no
    head, as in embedding models: the forward gives what a head would read, and nothing is generated.

    Raises ConfigurationError, naming the field, for anything that cannot work.
    """

    def layer_plans(self) -> list[LayerPlan]:
        """The shape of each cache of such a model, for `cache_bytes`."""
        return self.own_plans()


@dataclass(frozen=True)
class EncoderConfig(ModelConfig, OneVocabulary):
    """A bidirectional encoder: `vocab_size`, width, heads, feed-forward width, layers, and `LayerOptions`.

    `num_token_types`: kinds of tokens, such as those of a first and a second sentence, each with a vector that is added
    to its tokens; 0 for none. `first_norm=False`: no norm before the attention of the first block, where
    `embedding_norm` is right before it (ModernBERT). Every token sees every other one, and in layers that slide those
    at distances below `window_size`, on both sides.

    Raises ConfigurationError, naming the field, for anything that cannot work.
    """

    num_token_types: int = field(default=0, kw_only=True)
    first_norm: bool = field(default=True, kw_only=True)

    def check(self) -> None:
        super().check()
        require_count("num_token_types", self.num_token_types, least=0)
        self._check_sequential("an encoder")
        if not self.first_norm and self.norm_placement != "before":
            raise ConfigurationError(
                f'first_norm: expected True unless norms are "before" branches, got False with {self.norm_placement!r}'
            )


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderOptions(LayerOptions):
    """Options of encoder-decoders beside `LayerOptions`; `EncoderDecoderConfig` says what they mean."""

    num_decoder_layers: int | None = None
    shared_embeddings: bool = False
    start_token: int = 0


@dataclass(frozen=True)
class EncoderDecoderConfig(EncoderDecoderOptions, ModelConfig, TwoVocabularies):
    """An encoder-decoder model over two vocabularies; windows are the decoder's.

    `src_vocab_size=None`: sources come as vectors `[B, S, d_model]`. `num_layers` counts the encoder's, and the
    decoder's too unless `num_decoder_layers` is given. `shared_embeddings`: one table for source and target. Targets
    begin with `start_token`.

    Raises ConfigurationError, naming the field, for anything that cannot work.
    """

    @classmethod
    def original(cls, vocab_size: int = 37_000) -> Self:
        """The base model of Attention Is All You Need (arXiv 1706.03762), with its vocabulary of English and German.

        Six layers on both sides, one table of embeddings for source, target and head. Dropout acts on attention weights
        too, beside the branches and embeddings that the paper names.
        """
        width = 512
        return cls(
            vocab_size,
            vocab_size,
            width,
            num_heads=8,
            d_ff=2048,
            num_layers=6,
            position="sinusoidal",
            norm="layer",
            norm_placement="after",
            feed_forward="plain",
            activation="relu",
            feed_forward_bias=True,
            dropout=0.1,
            shared_embeddings=True,
            embedding_scale=width**0.5,
        )

    def check(self) -> None:
        if self.num_decoder_layers is not None:
            require_count("num_decoder_layers", self.num_decoder_layers, most=MAX_LAYERS)
        super().check()
        self._check_sequential("an encoder-decoder")
        if self.shared_embeddings and self.src_vocab_size != self.tgt_vocab_size:
            raise ConfigurationError(
                f"shared_embeddings: expected src_vocab_size and tgt_vocab_size to be one number, "
                f"got {self.src_vocab_size} and {self.tgt_vocab_size}"
            )
        if type(self.start_token) is not int or not 0 <= self.start_token < self.tgt_vocab_size:
            raise ConfigurationError(
                f"start_token: expected an id from 0 to {self.tgt_vocab_size - 1}, got {shown(self.start_token)}"
            )

    @property
    def decoder_layers(self) -> int:
        """How many layers the decoder has."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def cached_layers(self) -> int:
        """How many layers the decoder has."""
        return self.decoder_layers

    def encoder_layers(self) -> list[Self]:
        """The options of each layer of the encoder: patterns and windows are the decoder's."""
        return [replace(self, **self._of_layer(FULL, self.position))] * self.num_layers

    def _of_layer(self, kind: str, position: str) -> dict[str, Any]:
        return super()._of_layer(kind, position) | {"num_decoder_layers": None}

    def layer_plans(self) -> list[LayerPlan]:
        """The shape of each cache of such a model, for `cache_bytes`: of targets, and of the source of each layer."""
        own = self.own_plans()
        return own + [replace(plan, window_size=None, num_sinks=0, kind="cross") for plan in own]
