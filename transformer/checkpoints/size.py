"""Limits of the size of a model, checked from its configuration before it is built."""

from pathlib import Path

from ..errors import ConfigurationError
from ..models import Composition, DecoderOnlyConfig, EncoderConfig, EncoderDecoderConfig, ModelConfig
from .limits import MAX_CHECKPOINT_LAYERS, MAX_HEAD_DIM, MAX_PARAMETERS

Config = DecoderOnlyConfig | EncoderDecoderConfig | EncoderConfig | Composition


def check_size(config: Config, file: Path) -> None:
    """Raises ConfigurationError, with the file, for layers, parameters or widths of rotary heads above the limits."""
    of_model = config.config if isinstance(config, Composition) else config
    layers = of_model.num_layers
    if isinstance(config, EncoderDecoderConfig):
        layers = max(layers, config.decoder_layers)
    if layers > MAX_CHECKPOINT_LAYERS:
        raise ConfigurationError(f"{file}: expected at most {MAX_CHECKPOINT_LAYERS} layers, got {layers:,}")
    parameters = min_parameters(config)
    if parameters > MAX_PARAMETERS:
        raise ConfigurationError(
            f"{file}: expected a model of at most {MAX_PARAMETERS:,} parameters, got sizes that need at least "
            f"{parameters:,}"
        )
    widest = max((_head_dim(layer) for layer in _layers(config) if layer.position == "rotary"), default=0)
    if widest > MAX_HEAD_DIM:
        raise ConfigurationError(f"{file}: expected rotary heads of at most {MAX_HEAD_DIM:,}, got {widest:,}")


def min_parameters(config: Config) -> int:
    """A lower bound of the parameters of a model: embeddings, and for each layer the query and output projections and
    two matrices of each feed-forward network."""
    of_model = config.config if isinstance(config, Composition) else config
    if isinstance(of_model, EncoderDecoderConfig):
        rows = of_model.tgt_vocab_size
        if of_model.src_vocab_size is not None and not of_model.shared_embeddings:
            rows += of_model.src_vocab_size
    else:
        rows = of_model.vocab_size
    if of_model.position == "learned":
        rows += (of_model.max_length or 0) + of_model.position_offset
    inner = sum(layer.num_heads * _head_dim(layer) + (layer.num_experts or 1) * layer.d_ff for layer in _layers(config))
    return of_model.d_model * (rows + 2 * inner)


def _layers(config: Config) -> list[ModelConfig]:
    """The options of each layer."""
    if isinstance(config, Composition):
        return [layer.options for layer in config.layers] or [config.config] * config.config.num_layers
    both = config.decoder_layers if isinstance(config, EncoderDecoderConfig) else 0
    return [config] * (config.num_layers + both)


def _head_dim(layer: ModelConfig) -> int:
    return layer.head_dim or layer.d_model // layer.num_heads
