"""Conversion between our models and the engines' modules, which share every parameter."""

from dataclasses import replace

import torch
from torch import nn

from ..checkpoints.families.modular import MODULAR
from ..errors import ConfigurationError
from ..models import DecoderOnlyTransformer
from ..models.composition import UNSAID, composed, composition_of, parameters_by_name
from ..plain import is_hooked
from .causal_lm import ModularForCausalLM
from .config import ModularConfig


def as_pretrained(model: DecoderOnlyTransformer) -> ModularForCausalLM:
    """The model as a model of transformers, which shares every parameter: training one trains the other.

    The given model stays as it is. Weights are shared for good; what else changes later is not: after `to_gqa`, or
    another window, call this again. The result is in training mode if the model is.

    Raises ConfigurationError for another class of models, a wrapper, modules that are not of this library or have
    forward hooks, and what engines cannot run (ALiBi, relative bias, attention sinks, no head); the message names the
    option or the module.
    """
    composition = composition_of(model)
    for path, module in model.named_modules():
        if is_hooked(module):
            raise ConfigurationError(
                f"{'.'.join(filter(None, ('model', path)))}: expected a module without hooks and without a forward of "
                "its own, which the result would not run; remove them here, and add them to the result"
            )
    with torch.device("meta"):
        engine = ModularForCausalLM(ModularConfig.of(composition))
    ours = parameters_by_name(model)
    _assign(engine, {MODULAR.stored_name(name)[0]: parameter for name, parameter in ours.items()})
    if composition.config.tied_embeddings:
        engine.lm_head._parameters["weight"] = engine.model.embed_tokens.weight
    engine.config.dtype = engine.dtype
    engine.train(model.training)
    return engine


def from_pretrained_weights(engine_model: ModularForCausalLM) -> DecoderOnlyTransformer:
    """The other way: a model of this library that shares every parameter of `engine_model`, also after training.

    Raises ConfigurationError for another class, for adapters that are not merged, for quantised weights, and for a
    `config` that says something else than its modules; the message names what to do.
    """
    _check_engine(engine_model)
    with torch.device("meta"):
        model = composed(engine_model.config.composition())
    theirs = dict(engine_model.named_parameters(remove_duplicate=False))
    _assign(model, {name: theirs[MODULAR.stored_name(name)[0]] for name, _ in model.named_parameters()})
    model.tie_weights()
    return model.train(engine_model.training)


def _assign(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Makes these the parameters of `model`, by name; its own are left over where they are tied to another one."""
    for name, parameter in parameters.items():
        path, _, kind = name.rpartition(".")
        # Not by attribute: what intercepts the registration of parameters (accelerate's init_empty_weights) copies.
        model.get_submodule(path)._parameters[kind] = parameter


def _check_engine(engine_model: object) -> None:
    """Raises ConfigurationError unless this is a `ModularForCausalLM` whose layers are plain."""
    if type(engine_model) is not ModularForCausalLM:
        inner = _inside(engine_model)
        remedy = "use load_model for folders of other models"
        if inner is not None:
            remedy = f"give the model inside of it, model.{inner}"
        if isinstance(engine_model, nn.Module) and callable(getattr(engine_model, "merge_and_unload", None)):
            remedy = "merge the adapter first: engine_model = engine_model.merge_and_unload()"
        raise ConfigurationError(
            f"engine_model: expected a ModularForCausalLM, got {type(engine_model).__name__}; {remedy}"
        )
    _check_config(engine_model)
    with torch.device("meta"):
        plain = ModularForCausalLM(engine_model.config)
    expected = {path: type(module) for path, module in plain.named_modules()}
    for path, module in engine_model.named_modules():
        if type(module) is not expected.get(path):
            raise ConfigurationError(
                f"engine_model: expected {getattr(expected.get(path), '__name__', 'no module')} at {path}, got "
                f"{type(module).__name__}; merge adapters (merge_and_unload), or load the model again, without "
                "quantisation and wrappers"
            )
    shapes = {name: list(each.shape) for name, each in plain.named_parameters(remove_duplicate=False)}
    for name, parameter in engine_model.named_parameters():
        kind = type(parameter.data)  # a class of its own where weights are packed, or sharded over processes
        if list(parameter.shape) != shapes.get(name) or not parameter.is_floating_point() or kind is not torch.Tensor:
            raise ConfigurationError(
                f"engine_model: expected a float parameter {name} {shapes.get(name)}, got {parameter.dtype} "
                f"{list(parameter.shape)} in a {kind.__name__}; gather sharded weights, and load the model without "
                "quantisation"
            )
    tied = engine_model.config.tie_word_embeddings
    if tied and engine_model.lm_head.weight is not engine_model.model.embed_tokens.weight:
        raise ConfigurationError(
            "engine_model: expected lm_head.weight to be the table of embed_tokens, as config.tie_word_embeddings "
            "says, got a tensor of its own; call tie_weights(), or set config.tie_word_embeddings to False"
        )


def _check_config(engine_model: ModularForCausalLM) -> None:
    """Raises ConfigurationError if `config` was changed after the modules were built of it."""
    config, built_of = engine_model.config.composition().config, engine_model.model.built_of
    # What modules do not say, or what is read from their tensors.
    kept = {name: getattr(config, name) for name in (*UNSAID, "vocab_size", "tied_embeddings")}
    if engine_model.config.composition() != replace(built_of, config=replace(built_of.config, **kept)):
        raise ConfigurationError(
            "engine_model: expected the config that its modules were built of, got one that was changed since; set it "
            "back, or save it and load it anew"
        )


def _inside(wrapper: object) -> str | None:
    """Path of the `ModularForCausalLM` in a wrapper; None if there is none."""
    modules = wrapper.named_modules() if isinstance(wrapper, nn.Module) else ()
    return next((path for path, module in modules if type(module) is ModularForCausalLM), None)
