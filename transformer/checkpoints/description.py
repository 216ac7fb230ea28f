"""Description of a model as config.json: its options, read from its modules, and the first family that has them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attention import Attention
from ..errors import ConfigurationError
from ..models import Composition, DecoderOnlyConfig, DecoderOnlyTransformer, EncoderDecoderConfig, composition_of
from .documents import Keys
from .families import FAMILIES
from .family import Family
from .folder import CONFIG, GENERATION

OTHER_MODELS = (
    "save any other model with torch.save(model.state_dict(), file): later, build it anew by the same code and load "
    "torch.load(file) with load_state_dict"
)


def described_as(model: nn.Module) -> tuple[Family, dict[str, Any]]:
    """The first family whose config.json describes the model when read again, and that config.json.

    Raises ConfigurationError for a model that is not of this library, and for modules that no options describe.
    """
    _check_no_wrapper(model)
    families = [family for family in FAMILIES if type(model) is family.model]
    if not families:
        names = sorted({family.model.__name__ for family in FAMILIES})
        raise ConfigurationError(f"model: expected one of {names}, got {type(model).__name__}; {OTHER_MODELS}")
    described, reason = _description(model), ""
    published = _without_dropout(described)
    for family in families:
        options = described if family.own else published
        if isinstance(options, Composition) and not family.composes:
            continue
        try:
            document: dict[str, Any] = json.loads(json.dumps(family.describe(options)))
            again = family.read(Keys(document, Path(CONFIG), length=_length(options)), Keys({}, Path(GENERATION)))
        except ConfigurationError as error:
            reason = str(error)
            continue
        if _normal(again) == _normal(options):
            return family.laid_out(options), document
    raise ConfigurationError(f"model: expected options that config.json can express; {reason}; {OTHER_MODELS}")


def _description(model: nn.Module) -> Any:
    """The composition of a decoder-only model, else the configuration, with which the modules are compared.

    Of another model only the number of key/value heads is read from the modules.
    """
    try:
        if isinstance(model, DecoderOnlyTransformer):
            return composition_of(model)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}; {OTHER_MODELS}") from error
    config = _with_kv_heads(model, model.config)
    with torch.device("meta"):
        described = type(model).from_config(config)  # type: ignore[attr-defined]  # every model of a family has it
    _check_equal(_tensors(model), _tensors(described), "tensors")
    _check_equal(_attentions(model), _attentions(described), "attention modules")
    return config


def _with_kv_heads(model: nn.Module, config: Any) -> Any:
    """The configuration with the number of key/value heads that all attention modules have, which `to_gqa` changes."""
    found = {each.num_groups for each in model.modules() if isinstance(each, Attention)}
    if len(found) != 1 or found == {config.kv_heads}:
        return config
    number = found.pop()
    if number in (1, config.num_heads):
        return replace(config, attention="mqa" if number == 1 else "mha", num_groups=None)
    return replace(config, attention="gqa", num_groups=number)


def _without_dropout(described: Any) -> Any:
    """The configuration without dropout, which published families do not have; a composition if layers differ."""
    if not isinstance(described, Composition):
        return replace(described, dropout=0.0)
    layers = tuple(
        layer._replace(options=replace(layer.options, dropout=0.0), dropouts=None) for layer in described.layers
    )
    plain = replace(described, config=replace(described.config, dropout=0.0), layers=layers)
    if plain.layers:
        plain = plain.by_options()
    return plain if plain.layers else plain.config


def _check_no_wrapper(model: object) -> None:
    """Raises ConfigurationError, with the path of the model, for a wrapper of a model (such as torch.compile's)."""
    models = {family.model for family in FAMILIES}
    if not isinstance(model, nn.Module) or type(model) in models:
        return
    for name, module in model.named_modules():
        if type(module) in models:
            raise ConfigurationError(
                f"model: expected a model, got {type(model).__name__}, a wrapper of {type(module).__name__}; give "
                f"the wrapped model, model.{name}; {OTHER_MODELS}"
            )


def _tensors(model: nn.Module) -> dict[str, Any]:
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def _attentions(model: nn.Module) -> dict[str, Any]:
    """What attention modules do that their tensors do not say: window, sinks, scale, soft cap, causal order, rules."""
    return {
        name: {
            "window_size": each.window_size,
            "num_sinks": each.num_sinks,
            "scale": each.kernel.scale,
            "softcap": each.kernel.softcap,
            "rules": each.rules,
            "apply_causal_mask": each.apply_causal_mask,
        }
        for name, each in model.named_modules()
        if isinstance(each, Attention)
    }


def _check_equal(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Raises ConfigurationError, with the first difference between a model and its configuration."""
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise ConfigurationError(
                f"model: expected the {what} of its config, and so {name} {expected.get(name, 'not at all')}, got "
                f"{found.get(name, 'none')}; if the model was changed, change its config too: "
                f"model.config = dataclasses.replace(model.config, ...); {OTHER_MODELS}"
            )


def _length(options: Any) -> int | None:
    """The length of a scaling that depends on one, which families of published models do not have."""
    return None if isinstance(options, Composition) else getattr(options.rotary_scaling, "length", None)


def _normal(described: Any) -> Any:
    """A configuration or composition in a form that is equal for equal models."""
    if isinstance(described, Composition):
        return described
    if isinstance(described, DecoderOnlyConfig):
        return Composition(described)
    options: dict[str, Any] = described.to_dict()
    if isinstance(described, EncoderDecoderConfig):
        options["num_decoder_layers"] = described.decoder_layers
    head_dim = options["head_dim"] or options["d_model"] // options["num_heads"]
    return options | {
        "attention": described.kv_heads,
        "num_groups": None,
        "head_dim": head_dim,
        "scale": options["scale"] or head_dim**-0.5,
        "out_bias": options["attention_bias"] if options["out_bias"] is None else options["out_bias"],
        "rotary_dim": options["rotary_dim"] or head_dim,
        "layer_pattern": described.layer_kinds,
    }
