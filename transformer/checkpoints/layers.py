"""Layers of a composition in config.json: `layers`, with the options in which each differs, and what goes with them."""

from dataclasses import fields, replace
from typing import Any

from ..models import Composition, DecoderOnlyConfig, LayerParts, NormConfig
from ..models.layers import Dropouts
from ..models.normal_form import OF_MODEL, PATTERNS
from .documents import Keys
from .options import check_known, named, read_field, read_fields, written

LAYERS, LAST_NORM = "layers", "last_norm"
KEYS = (LAYERS, LAST_NORM)
"""Keys of config.json beside the options; a model that options describe has none of them."""

QK_NORM, DROPOUTS = "qk_norm_options", "dropouts"
"""Keys of a layer beside its options, where the norm of queries and keys is another one, or dropout differs inside."""

_OF_THE_STACK = (*OF_MODEL, *PATTERNS, "d_model", "num_layers")
_OF_A_LAYER = {each.name: each for each in fields(DecoderOnlyConfig) if each.name not in _OF_THE_STACK}


def write_layers(composition: Composition, config: DecoderOnlyConfig) -> dict[str, Any]:
    """The keys for the layers, as differences to `config`, which a reader has; none where options describe the model.

    Raises ConfigurationError for a scaling that is not of this library.
    """
    if not composition.layers:
        return {}
    document: dict[str, Any] = {
        LAYERS: [_differences(*each) for each in zip(composition.layers, config.each_layer(), strict=True)],
    }
    if composition.last_norm is not None:
        document[LAST_NORM] = composition.last_norm.to_dict()
    return document


def read_layers(keys: Keys, config: DecoderOnlyConfig) -> Composition:
    """The composition in a file whose options give `config`.

    Raises ConfigurationError, with the key and the file, for a missing, unknown or invalid key.
    """
    if LAYERS not in keys:
        if not keys.is_empty(LAST_NORM):
            raise keys.refusal(LAST_NORM, f"no such key without {LAYERS}")
        return Composition(config)
    objects = keys.objects(LAYERS, config.num_layers)
    layers = tuple(_read_layer(*each) for each in zip(objects, config.each_layer(), strict=True))
    last_norm = read_fields(keys.inner(LAST_NORM), NormConfig) if LAST_NORM in keys else None
    return named(keys, lambda: Composition(config, layers, last_norm))


def _default_qk_norm(options: DecoderOnlyConfig) -> NormConfig | None:
    """The norm of queries and keys that options alone give: the norm of the blocks."""
    return options.part(NormConfig) if options.qk_norm else None


def _differences(own: LayerParts, described: DecoderOnlyConfig) -> dict[str, Any]:
    found = {name: getattr(own.options, name) for name in _OF_A_LAYER}
    document = {name: written(value) for name, value in found.items() if value != getattr(described, name)}
    if own.qk_norm is not None and own.qk_norm != _default_qk_norm(own.options):
        document[QK_NORM] = own.qk_norm.to_dict()
    if own.dropouts is not None:
        document[DROPOUTS] = own.dropouts._asdict()
    return document


def _read_layer(keys: Keys, described: DecoderOnlyConfig) -> LayerParts:
    check_known(keys, [*_OF_A_LAYER, QK_NORM, DROPOUTS])
    values = {name: read_field(keys, _OF_A_LAYER[name]) for name in keys.given if name in _OF_A_LAYER}
    options = named(keys, lambda: replace(described, **values))
    qk_norm = _default_qk_norm(options)
    if QK_NORM in keys:
        if not options.qk_norm:
            raise keys.refusal(QK_NORM, "no such key without qk_norm")
        qk_norm = read_fields(keys.inner(QK_NORM), NormConfig)
    return LayerParts(options, qk_norm, _read_dropouts(keys.inner(DROPOUTS)) if DROPOUTS in keys else None)


def _read_dropouts(keys: Keys) -> Dropouts:
    check_known(keys, Dropouts._fields)
    numbers = {name: keys.number(name, zero=True) for name in Dropouts._fields}
    for name, number in numbers.items():
        if number >= 1.0:
            raise keys.refusal(name, "a number below 1")
    return Dropouts(**numbers)
