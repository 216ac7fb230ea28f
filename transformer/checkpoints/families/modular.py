"""Compositions of this library that engines run: `modular_attention`, with standard keys and names where there are any.

Standard keys are those of transformers and vLLM; options without one have a key by their own name. A composition whose
layers differ has `layers` too, with the options in which each layer differs from those of the model.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import ConfigurationError
from ...models import FULL, SLIDING, Composition, DecoderOnlyConfig, DecoderOnlyTransformer, composed
from ...models.normal_form import PATTERNS
from ...positions import DynamicNTKScaling, LongRoPEScaling
from ..documents import Keys
from ..entries import UNALTERED, Causal, Entry, Heads, NumberOrNone, Options, Token, Word
from ..family import Family
from ..folder import CONFIG, GENERATION
from ..layers import read_layers, write_layers
from ..names import Names
from ..options import named, read_field, written
from ..rope import CONTEXT, Rope
from ..scalings import LENGTH
from ..windows import LayerTypes
from .llama import ACTIVATIONS, SIZES
from .llama import NAMES as LLAMA_NAMES

_FIELDS = {each.name: each for each in fields(DecoderOnlyConfig)}
_POSITIONS = {word: word for word in ("rotary", "learned", "sinusoidal", "none")}
_ROTARY_LENGTH = "rotary_length"


class _Own(Entry):
    """Options with the key of another name, or of their own; a missing key gives the option's default."""

    def __init__(self, *options: str, **renamed: str) -> None:
        self._keys = {option: option for option in options} | renamed

    def read(self, keys: Keys) -> Options:
        return {option: read_field(keys, _FIELDS[option], key) for option, key in self._keys.items() if key in keys}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {key: written(options[option]) for option, key in self._keys.items()}

    @property
    def keys(self) -> Mapping[str, str]:
        return self._keys


class _Positions(Rope):
    """The positions, the length of the model, and of a scaling that depends on a length that length too."""

    def read(self, keys: Keys) -> Options:
        if _ROTARY_LENGTH in keys:
            keys = keys.with_length(keys.whole(_ROTARY_LENGTH))
        position = keys.word("position", _POSITIONS, "rotary")
        max_length = keys.whole(LENGTH) if position == "learned" else None
        return super().read(keys) | {"position": position, "max_length": max_length}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        document = super().write(options) | {"position": options["position"], CONTEXT: options["context_length"]}
        scaling = options["rotary_scaling"]
        if isinstance(scaling, DynamicNTKScaling | LongRoPEScaling):
            document[_ROTARY_LENGTH] = scaling.length
        return document if options["max_length"] is None else document | {LENGTH: options["max_length"]}


_LAYER, _THEIRS = "decoder.blocks.{}.", "model.layers.{}."

NAMES: Names = {
    **LLAMA_NAMES,
    "positions.positions.embedding": "model.embed_positions",
    "positions.norm": "model.embed_norm",
    f"{_LAYER}attention.q_norm": f"{_THEIRS}self_attn.q_norm",
    f"{_LAYER}attention.k_norm": f"{_THEIRS}self_attn.k_norm",
    # One name for each place of a norm, as in Gemma 2; Llama's names would give one name to two places.
    f"{_LAYER}attention_residual.norm_branch": f"{_THEIRS}post_attention_layernorm",
    f"{_LAYER}attention_residual.norm_after": f"{_THEIRS}post_attention_layernorm",
    f"{_LAYER}feed_forward_residual.norm_before": f"{_THEIRS}pre_feedforward_layernorm",
    f"{_LAYER}feed_forward_residual.norm_branch": f"{_THEIRS}post_feedforward_layernorm",
    f"{_LAYER}feed_forward_residual.norm_after": f"{_THEIRS}post_feedforward_layernorm",
}
"""Modules of a composed model, each with its name in a checkpoint and in the modules of engines; `parameters_by_name`
gives the parameters of every model by these."""


class ModularFamily(Family):
    """The family of compositions; it reads and writes a whole `Composition`."""

    def read(self, keys: Keys, generation: Keys) -> Composition:
        composition = read_layers(keys, self._options(keys, generation))
        if reason := why_no_engine(composition):
            raise ConfigurationError(f"{keys.file}, {reason}")
        return composition

    def describe(self, described: Composition) -> dict[str, Any]:
        """The keys of config.json for a composition.

        Raises ConfigurationError for one that engines cannot run.
        """
        if reason := why_no_engine(described):
            raise ConfigurationError(f"model: {reason}; only this library runs such a model (save_model, load_model)")
        config = _with_windows_of_layers(described)
        document: dict[str, Any] = json.loads(json.dumps(self.write(config.to_dict())))
        again = self._options(Keys(document, Path(CONFIG)), Keys({}, Path(GENERATION)))
        return document | write_layers(described, again)

    def build(self, keys: Keys, config: Composition) -> nn.Module:
        """The model, on the default device. Raises ConfigurationError, with the file."""
        return named(keys, lambda: composed(config))

    def _options(self, keys: Keys, generation: Keys) -> DecoderOnlyConfig:
        """The options of the model, with None where a key states what is the default anyway."""
        config: DecoderOnlyConfig = super().read(keys, generation)
        if config.head_dim is not None and config.head_dim * config.num_heads == config.d_model:
            config = replace(config, head_dim=None)
        return replace(config, layer_pattern=None) if config.layer_pattern == SLIDING else config


def _all_sliding(_: Keys, layers: int) -> list[str]:
    return [SLIDING] * layers


def _with_windows_of_layers(composition: Composition) -> DecoderOnlyConfig:
    """The options of the model, with the windows of its layers, which engines read from them."""
    windows = [parts.options.window_size for parts in composition.layers]
    if not windows:
        return composition.config
    kinds = [FULL if window is None else SLIDING for window in windows]
    largest = max((window for window in windows if window is not None), default=None)
    options: dict[str, Any] = dict.fromkeys(PATTERNS)
    options |= {"window_size": largest, "num_sinks": 0, "layer_pattern": " ".join(kinds)}
    return replace(composition.config, **options)


MODULAR = ModularFamily(
    model_type=DecoderOnlyConfig.model_type,
    architecture="ModularForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *SIZES,
        Heads(),
        _Positions(default_length=2048),
        LayerTypes(_all_sliding, window=None),
        Token("start_token", "bos_token_id"),
        Word("activation", "hidden_act", ACTIVATIONS, "silu"),
        NumberOrNone("softcap", "attn_logit_softcapping"),
        NumberOrNone("logit_softcap", "final_logit_softcapping"),
        _Own(
            norm_eps="rms_norm_eps",
            feed_forward_bias="mlp_bias",
            tied_embeddings="tie_word_embeddings",
        ),
        _Own("attention_bias", "out_bias", "qk_norm", "qk_norm_per_head", "scale"),
        _Own("rotary_dim", "rotary_interleaved", "sinusoidal_interleaved"),
        _Own("norm", "norm_bias", "norm_unit_offset", "norm_placement", "feed_forward", "residual"),
        _Own("position_pattern", "rotary_sliding_base", "position_offset"),
        _Own("dropout", "residual_scale", "embedding_scale", "embedding_norm", "logit_scale", "head_bias"),
        Causal(),
        *UNALTERED,
    ),
    names=NAMES,
    base="model.",
    composes=True,
    own=True,
)


def write_composition(composition: Composition) -> dict[str, Any]:
    """The keys of config.json for a composition, with `architectures` and `model_type`.

    Raises ConfigurationError for one that engines cannot run, with the reason.
    """
    return MODULAR.describe(composition)


def read_composition(keys: Keys, generation: Keys | None = None) -> Composition:
    """The composition in config.json, with the tokens of generation_config.json.

    Raises ConfigurationError, with the key and the file.
    """
    return MODULAR.read(keys, Keys({}, Path(GENERATION)) if generation is None else generation)


def why_no_engine(composition: Composition) -> str:
    """The reason why engines (transformers, vLLM) cannot run a composition, with its option; empty if they can."""
    if not composition.config.has_head:
        return "has_head: expected a model with a head, which engines run, got has_head=False"
    layers = composition.expanded().layers
    if {parts.options.window_size for parts in layers} - {None} == {1}:
        return "window_size: expected at least 2 in a layer, as the caches of transformers keep no window of 1, got 1"
    for layer, parts in enumerate(layers):
        options = parts.options
        if options.position not in _POSITIONS:
            return (
                f"position: expected one of {sorted(_POSITIONS)}, which engines run, got {options.position!r} in layer "
                f"{layer}"
            )
        if options.feed_forward == "mixture":
            return f"feed_forward: expected 'gated' or 'plain', which engines run, got 'mixture' in layer {layer}"
        if not options.qk_norm_per_head:
            return (
                f"qk_norm_per_head: expected True, which engines run on any number of ranks, got False in layer {layer}"
            )
        if options.sink_logits:
            return f"sink_logits: expected False, which engines run, got True in layer {layer}"
        if options.num_sinks:
            return f"num_sinks: expected 0, which engines run, got {options.num_sinks} in layer {layer}"
    return ""
