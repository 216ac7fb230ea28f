"""Composition of a decoder-only model: its options, and where its layers differ from them, read from its modules."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..blocks import BlockStack
from ..blocks.layers import shortest_pattern
from ..errors import ConfigurationError
from .config import DecoderOnlyConfig, DecoderOnlyOptions
from .decoder_only import DecoderOnlyTransformer
from .layers import PositionMakers, decoder_block, input_positions, language_head, norm_maker
from .model_options import check_sharing, has_own_biases, parameters_by_name, read_ends
from .module_options import read_block, refuse
from .normal_form import ADDED, NOT_ADDED, PATTERNS, LayerParts, normal_layer, normal_norm, normal_options
from .parts import FULL, SLIDING, NormConfig
from .tokens import TokenEmbedding

__all__ = ["Composition", "LayerParts", "composed", "composition_of", "parameters_by_name"]


@dataclass(frozen=True, eq=False)
class Composition:
    """A decoder-only model as data: `config` says it all where `layers` is empty, else what is not of a layer.

    With `layers`, `config.position` says what is added to embeddings ("learned", "sinusoidal"), `config.dropout` is
    that of embeddings, and `config.embedding_norm` is a norm as the blocks of the first layer have. Two compositions
    are equal if they describe the same model, however they are spelled.

    Raises ConfigurationError for layers that do not make one model.
    """

    config: DecoderOnlyConfig
    layers: tuple[LayerParts, ...] = ()
    last_norm: NormConfig | None = None
    """The norm after the last block; read only where `layers` are given."""

    def __post_init__(self) -> None:
        if not isinstance(self.config, DecoderOnlyConfig):
            raise ConfigurationError(f"config: expected a DecoderOnlyConfig, got {type(self.config).__name__}")
        for layer in self.layers:
            if not isinstance(layer, LayerParts):
                raise ConfigurationError(f"layers: expected LayerParts, got {type(layer).__name__}")
        if any(layer.options.num_layers != 1 for layer in self.layers):
            raise ConfigurationError("layers: expected num_layers=1 in options of a layer")
        for name in PATTERNS:
            if any(getattr(layer.options, name) is not None for layer in self.layers):
                raise ConfigurationError(f"layers: expected {name}=None in options of a layer")
        widths = {layer.options.d_model for layer in self.layers} - {self.config.d_model}
        if widths:
            raise ConfigurationError(
                f"layers: expected d_model={self.config.d_model} in each, as in config, got {sorted(widths)}"
            )
        relative = {_shared_bias(layer.options) for layer in self.layers if layer.options.position == "relative"}
        if len(relative) > 1:
            raise ConfigurationError(
                "layers: expected relative positions that all layers share, or one for each layer (relative_per_layer "
                "in every such layer), got layers that differ in it or in heads, buckets or distances"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Composition) and _values(self.expanded()) == _values(other.expanded())

    def __hash__(self) -> int:
        return hash(_values(self.expanded()))

    def expanded(self) -> "Composition":
        """The same with an entry of `layers` for each layer, and one spelling of the options."""
        config, layers, last_norm = self.config, self.layers, self.last_norm
        if not layers:
            norm = config.part(NormConfig)
            layers = tuple(LayerParts(layer, norm if config.qk_norm else None) for layer in config.each_layer())
            last_norm = None if config.norm_placement == "after" else norm
        one_bias = sum(layer.options.position == "relative" for layer in layers) < 2
        layers = tuple(normal_layer(layer, config, one_bias=one_bias) for layer in layers)
        own: dict[str, Any] = {}
        if config.position in ADDED:
            own = {name: getattr(config, name) for name in ("position", *NOT_ADDED)}
        config = replace(layers[0].options, num_layers=len(layers), dropout=config.dropout, **own)
        return Composition(normal_options(config), layers, None if last_norm is None else normal_norm(last_norm))

    def by_options(self) -> "Composition":
        """The same without `layers`, if options say it all; else as `expanded`."""
        whole = self.expanded()
        described = Composition(_options_of([layer.options for layer in whole.layers]))
        return described if described == whole else whole


def composition_of(model: DecoderOnlyTransformer) -> Composition:
    """The composition of a model, read from its modules.

    It is `Composition(model.config)` where the modules are still what that configuration describes. What modules do
    not say (stop, pad and start tokens, `context_length`) is taken from the configuration.

    Raises ConfigurationError, with the path of the module, for a wrapper, a subclass, a module of one's own, and for
    what no options describe.
    """
    whole = _read(model)
    _check_parameters(model, whole)
    if isinstance(model.config, DecoderOnlyConfig):
        described = Composition(model.config)
        if described == whole:
            return described
    return whole.by_options()


def composed(composition: Composition) -> DecoderOnlyTransformer:
    """A new model of that composition: by options where these say it all, else by parts."""
    if not isinstance(composition, Composition):
        raise ConfigurationError(f"composition: expected a Composition, got {type(composition).__name__}")
    if not composition.layers:
        return DecoderOnlyTransformer.from_config(composition.config)
    whole = composition.expanded()
    config = whole.config
    embedding = TokenEmbedding(config.vocab_size, config.d_model, config.embedding_scale)
    positions = input_positions(config)
    makers = PositionMakers()
    blocks = [
        decoder_block(
            layer.options,
            makers.of(layer.options),
            window_size=layer.options.window_size,
            qk_norm=layer.qk_norm,
            dropouts=layer.each_dropout,
        )
        for layer in whole.layers
    ]
    norm = None if whole.last_norm is None else norm_maker(whole.last_norm)(config.d_model)
    head = language_head(config, config.vocab_size, embedding) if config.has_head else None
    model = DecoderOnlyTransformer.from_parts(embedding, BlockStack(blocks, norm), head, positions)
    model.config = replace(model.config, **{name: getattr(config, name) for name in UNSAID})
    return model


UNSAID = ("stop_tokens", "pad_token", "start_token", "context_length")
"""Options of a model that its modules do not say."""


def _values(composition: Composition) -> tuple[Any, ...]:
    return tuple(getattr(composition, each.name) for each in fields(composition))


def _options_of(layers: list[DecoderOnlyConfig]) -> DecoderOnlyConfig:
    """Options of a model that has these layers, in normal form; of another model where no options describe them."""
    positioned = [each for each in layers if each.position != "none"] or layers
    sliding = [each for each in layers if each.window_size is not None]
    # Full layers have what sliding ones may have instead.
    typical = next((each for each in positioned if each.window_size is None), positioned[0])
    window = sliding[0] if sliding else typical
    turned = next((each for each in positioned if each.window_size is not None), typical)
    same_rotation = (turned.rotary_base, turned.rotary_scaling) == (typical.rotary_base, typical.rotary_scaling)
    kinds = [FULL if each.window_size is None else SLIDING for each in layers]
    positions = [each.position for each in layers]
    return replace(
        typical,
        num_layers=len(layers),
        window_size=window.window_size,
        num_sinks=window.num_sinks,
        layer_pattern=_pattern(kinds),
        position_pattern=_pattern(positions) if set(positions) == {typical.position, "none"} else None,
        rotary_sliding_base=None if same_rotation or typical.position != "rotary" else turned.rotary_base,
    )


def _pattern(words: Sequence[str]) -> str | None:
    return shortest_pattern(words) if len(set(words)) > 1 else None


def _shared_bias(options: DecoderOnlyConfig) -> tuple[Any, ...]:
    """Equal for layers that may share a relative bias, or that have one each."""
    if options.relative_per_layer:
        return ()
    return options.num_heads, options.relative_buckets, options.relative_max_distance


def _read(model: DecoderOnlyTransformer) -> Composition:
    """The composition of the modules, with all layers."""
    if type(model) is not DecoderOnlyTransformer:
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise ConfigurationError(
            f"model: expected a plain DecoderOnlyTransformer, got {kind}; give the model inside a wrapper, and what a "
            "subclass adds has no composition"
        )
    if not isinstance(model.config, DecoderOnlyOptions):
        raise ConfigurationError(
            f"model.config: expected a DecoderOnlyConfig or a ComposedConfig, got {type(model.config).__name__}"
        )
    ends = read_ends(model)
    blocks = [read_block(f"decoder.blocks.{index}", block) for index, block in enumerate(model.decoder.blocks)]
    of_layers = ends.options | {name: getattr(model.config, name) for name in UNSAID} | NOT_ADDED
    own_biases = has_own_biases(model.decoder)
    layers = tuple(
        LayerParts(
            DecoderOnlyConfig(**of_layers | block.options, num_layers=1, relative_per_layer=own_biases),
            block.qk_norm,
            block.dropouts,
        )
        for block in blocks
    )
    if ends.embedding_norm is not None and normal_norm(ends.embedding_norm) != normal_norm(layers[0].options):
        refuse("positions.norm", model.positions.norm, "a norm as the first block has", "give both the same norm")
    own: dict[str, Any] = {name: ends.options[name] for name in ("dropout", "position", *NOT_ADDED)}
    config = replace(layers[0].options, num_layers=len(layers), **own)
    if config.position not in ADDED:
        config = replace(config, position=layers[0].options.position)
    return Composition(config, layers, ends.last_norm).expanded()


def _check_parameters(model: DecoderOnlyTransformer, composition: Composition) -> None:
    """Raises ConfigurationError, with the first difference, unless the model's parameters are those of its options."""
    check_sharing(model)
    with torch.device("meta"):
        described = composed(composition)
    found, expected = (
        {name: list(parameter.shape) for name, parameter in named.items()}
        for named in (parameters_by_name(model), dict(described.named_parameters()))
    )
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise ConfigurationError(
                f"model: expected the tensors of its modules' options, and so {name} "
                f"{expected.get(name, 'not at all')}, got {found.get(name, 'none')}; what was added to a module or "
                "changed in shape has no composition"
            )
