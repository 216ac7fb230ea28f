"""Sizes of a model that a configuration describes, compared with what there may be before anything is built."""

from pathlib import Path

from ..errors import ConfigurationError
from ..models import DecoderOnlyConfig, EncoderConfig, EncoderDecoderConfig
from .limits import MOST_LAYERS, MOST_PARAMETERS

Config = DecoderOnlyConfig | EncoderDecoderConfig | EncoderConfig


def check_size(config: Config, file: Path) -> None:
    """Raises ConfigurationError, naming the file, for more layers or parameters than any model has."""
    layers = config.num_layers
    if isinstance(config, EncoderDecoderConfig):
        layers = max(layers, config.decoder_layers)
    if layers > MOST_LAYERS:
        raise ConfigurationError(f"{file}: expected at most {MOST_LAYERS} layers, got {layers:,}")
    parameters = least_parameters(config)
    if parameters > MOST_PARAMETERS:
        raise ConfigurationError(
            f"{file}: expected sizes of at most {MOST_PARAMETERS:,} parameters in all, got some that take "
            f"{parameters:,} at least"
        )


def least_parameters(config: Config) -> int:
    """No more than a model of this configuration has: its tables, and of each layer queries, outputs and two matrices
    of the feed-forward network."""
    width, layers = config.d_model, config.num_layers
    if isinstance(config, EncoderDecoderConfig):
        layers += config.decoder_layers
        rows = config.tgt_vocab_size
        if config.src_vocab_size is not None and not config.shared_embeddings:
            rows += config.src_vocab_size
    else:
        rows = config.vocab_size
    if config.position == "learned":
        rows += config.max_length or 0
    queries = config.num_heads * (config.head_dim or width // config.num_heads)
    return width * (rows + layers * 2 * (queries + config.d_ff))
