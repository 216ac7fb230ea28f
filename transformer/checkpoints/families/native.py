"""Models of this library that engines do not run: `modular_attention_native`, every option by its own name.

`architectures` has the name of our class, and tensors have the names of the model. Only `load_model` reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...models import (
    ClassifierConfig,
    Composition,
    DecoderOnlyConfig,
    DecoderOnlyTransformer,
    EncoderClassifier,
    EncoderConfig,
    EncoderDecoderConfig,
    EncoderDecoderTransformer,
    EncoderTransformer,
    UMT5Model,
    composed,
)
from ..documents import Keys
from ..family import PAD, STOP, Family
from ..layers import KEYS, read_layers, write_layers
from ..names import Stored
from ..options import fields_of, named, read_fields
from ..rope import UNSTATED_LENGTH
from ..scalings import LENGTH

OTHERS = ("architectures", "dtype", "model_type", LENGTH)
"""Keys of config.json that are no options."""

LATER = frozenset(
    {
        "embedding_norm",
        "experts_per_token",
        "head_bias",
        "normalize_routing_weights",
        "num_experts",
        "first_norm",
        "position_offset",
        "position_pattern",
        "qk_norm_per_head",
        "residual",
        "residual_scale",
        "rotary_sliding_base",
        "sink_logits",
        "sinusoidal_interleaved",
    }
)
"""Options that were added after the first release of this format, which files may lack: they then have their defaults.
Every other option must be there, so that a damaged file is refused instead of read as another model."""


@dataclass(frozen=True)
class NativeFamily(Family):
    """The models of one class. `start` is the key of `start_token` in generation_config.json."""

    start: str = ""

    def read(self, keys: Keys, generation: Keys) -> Any:
        more = KEYS if self.composes else ()
        config = read_fields(keys, self.config, optional=LATER, others=(*OTHERS, *more))
        tokens: dict[str, Any] = {}
        if STOP in generation:
            tokens["stop_tokens"] = generation.tokens(STOP)
        if PAD in generation:
            tokens["pad_token"] = generation.whole(PAD, least=0)
        if self.start in generation:
            tokens["start_token"] = generation.whole(self.start, least=0)
        config = named(generation, lambda: replace(config, **tokens))
        return read_layers(keys, config) if self.composes else config

    def describe(self, described: Any) -> dict[str, Any]:
        document = {"architectures": [self.architecture], "model_type": self.model_type}
        config = described.config if self.composes else described
        layers = write_layers(described, config) if self.composes else {}
        length = config.max_length or config.context_length or UNSTATED_LENGTH
        return document | fields_of(config) | layers | {LENGTH: length}

    def generation(self, document: Mapping[str, Any]) -> dict[str, Any]:
        stop = document["stop_tokens"]
        tokens = {STOP: stop[0] if len(stop) == 1 else stop or None, PAD: document["pad_token"]}
        return tokens | {self.start: document["start_token"]} if self.start else tokens

    def build(self, keys: Keys, config: Any) -> nn.Module:
        make = composed if isinstance(config, Composition) else self.model.from_config
        return named(keys, lambda: make(config))

    def stored_name(self, ours: str) -> tuple[str, Stored]:
        return ours, Stored(ours.rpartition(".")[0])


def _native(model: type[nn.Module], config: type[Any], start: str = "", *, composes: bool = False) -> NativeFamily:
    return NativeFamily(
        model_type="modular_attention_native",
        architecture=model.__name__,
        config=config,
        model=model,
        entries=(),
        names={},
        start=start,
        composes=composes,
        own=True,
        applies=lambda keys: keys.names("architectures") == [model.__name__],
    )


NATIVE = (
    _native(DecoderOnlyTransformer, DecoderOnlyConfig, "bos_token_id", composes=True),
    _native(EncoderDecoderTransformer, EncoderDecoderConfig, "decoder_start_token_id"),
    _native(UMT5Model, EncoderDecoderConfig, "decoder_start_token_id"),
    _native(EncoderTransformer, EncoderConfig),
    _native(EncoderClassifier, ClassifierConfig),
)
"""One family for each class of models."""
