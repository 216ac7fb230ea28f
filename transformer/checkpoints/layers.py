"""Layers of a composition in config.json: `layers`, with the options in which each differs, and what goes with them."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ..models import FULL, DecoderOnlyConfig
from ..models.composition import Composition, LayerParts
from ..models.parts import NormConfig
from .documents import Keys
from .options import check_known, named, read_field, read_fields, written

LAYERS, LAST_NORM, HEAD_BIAS, QK_NORM = "layers", "last_norm", "head_bias", "qk_norm_options"
KEYS = (LAYERS, LAST_NORM, HEAD_BIAS)
"""Keys of config.json beside the options; a model that options describe has none of them."""

OF_THE_MODEL = frozenset(
    {
        "vocab_size",
        "d_model",
        "num_layers",
        "layer_pattern",
        "context_length",
        "tied_embeddings",
        "embedding_scale",
        "logit_scale",
        "logit_softcap",
        "start_token",
        "stop_tokens",
        "pad_token",
        "has_head",
    }
)
"""Options that are not of a layer."""

_OF_A_LAYER = {each.name: each for each in fields(DecoderOnlyConfig) if each.name not in OF_THE_MODEL}


def all_layers(composition: Composition) -> tuple[LayerParts, ...]:
    """Every layer of the composition, also where options alone describe the model."""
    config = composition.config
    return composition.layers or tuple(_described(config, layer) for layer in range(config.num_layers))


def write_layers(composition: Composition, config: DecoderOnlyConfig) -> dict[str, Any]:
    """The keys for the layers, as differences to `config`, which a reader has; none where options describe the model.

    Raises ConfigurationError for a scaling that is not of this library.
    """
    if not composition.layers:
        return {}
    described = (_described(config, layer) for layer in range(config.num_layers))
    document: dict[str, Any] = {
        LAYERS: [_differences(own, other) for own, other in zip(composition.layers, described, strict=True)],
        HEAD_BIAS: composition.head_bias,
    }
    if composition.last_norm is not None:
        document[LAST_NORM] = _written_norm(composition.last_norm)
    return document


def read_layers(keys: Keys, config: DecoderOnlyConfig) -> Composition:
    """The composition in a file whose options give `config`.

    Raises ConfigurationError, with the key and the file, for a missing, unknown or invalid key.
    """
    if LAYERS not in keys:
        for key in (LAST_NORM, HEAD_BIAS):
            if not keys.is_empty(key):
                raise keys.refusal(key, f"no such key without {LAYERS}")
        return Composition(config)
    layers = [
        _read_layer(inner, _described(config, layer).options)
        for layer, inner in enumerate(keys.objects(LAYERS, config.num_layers))
    ]
    last_norm = read_fields(keys.inner(LAST_NORM), NormConfig) if LAST_NORM in keys else None
    return Composition(config, tuple(layers), last_norm, keys.flag(HEAD_BIAS, False))


def _described(config: DecoderOnlyConfig, layer: int) -> LayerParts:
    """A layer as the options of the model describe it."""
    own: dict[str, Any] = {"num_layers": 1, "layer_pattern": None}
    if config.layer_kinds[layer] == FULL:
        own |= {"window_size": None, "num_sinks": 0}
    options = replace(config, **own)
    return LayerParts(options, default_qk_norm(options))


def default_qk_norm(options: DecoderOnlyConfig) -> NormConfig | None:
    """The norm of queries and keys that options alone give: the norm of the blocks."""
    return options.part(NormConfig) if options.qk_norm else None


def _differences(own: LayerParts, described: LayerParts) -> dict[str, Any]:
    found = {name: getattr(own.options, name) for name in _OF_A_LAYER}
    document = {name: written(value) for name, value in found.items() if value != getattr(described.options, name)}
    if own.qk_norm is not None and own.qk_norm != default_qk_norm(own.options):
        document[QK_NORM] = _written_norm(own.qk_norm)
    return document


def _written_norm(norm: NormConfig) -> Mapping[str, Any]:
    return norm.to_dict()


def _read_layer(keys: Keys, described: DecoderOnlyConfig) -> LayerParts:
    check_known(keys, [*_OF_A_LAYER, QK_NORM])
    values = {name: read_field(keys, _OF_A_LAYER[name]) for name in keys.given if name in _OF_A_LAYER}
    options = named(keys, lambda: replace(described, **values))
    if QK_NORM not in keys:
        return LayerParts(options, default_qk_norm(options))
    if not options.qk_norm:
        raise keys.refusal(QK_NORM, "no such key without qk_norm")
    return LayerParts(options, read_fields(keys.inner(QK_NORM), NormConfig))
