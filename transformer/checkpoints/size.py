"""Limits of the size of a model, checked from its configuration before it is built."""

from pathlib import Path

from ..errors import ConfigurationError
from ..models import DecoderOnlyConfig, EncoderConfig, EncoderDecoderConfig
from .limits import MAX_CHECKPOINT_LAYERS, MAX_PARAMETERS

Config = DecoderOnlyConfig | EncoderDecoderConfig | EncoderConfig


def check_size(config: Config, file: Path) -> None:
    """Raises ConfigurationError, with the file, for more layers or parameters than the limits allow."""
    layers = config.num_layers
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


def min_parameters(config: Config) -> int:
    """A lower bound of the parameters of a model: embeddings, and for each layer the query and output projections and
    two matrices of the feed-forward network."""
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
