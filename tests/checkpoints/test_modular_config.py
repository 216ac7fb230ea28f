"""Compositions as keys of config.json in the format `modular_attention`: nothing is lost, damage is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.compositions import FOR_ENGINES, LAYERED, NATIVE, config_of
from transformer.checkpoints.documents import Keys
from transformer.checkpoints.families.modular import read_composition, why_no_engine, write_composition
from transformer.checkpoints.rope import UNSTATED_LENGTH
from transformer.errors import ConfigurationError
from transformer.models import Composition

ALL = {name: Composition(config_of(options)) for name, options in FOR_ENGINES.items()} | LAYERED


def written(composition: Composition) -> dict[str, Any]:
    return json.loads(json.dumps(write_composition(composition), allow_nan=False))


def read(document: dict[str, Any], **generation: object) -> Composition:
    return read_composition(Keys(document, Path("config.json")), Keys(generation, Path("generation_config.json")))


@pytest.mark.parametrize("composition", ALL.values(), ids=ALL)
def test_what_is_written_is_read(composition: Composition) -> None:
    document = written(composition)
    assert document["model_type"] == "modular_attention"
    assert document["architectures"] == ["ModularForCausalLM"]
    again = read(document)
    assert again.layers == composition.layers
    assert again.last_norm == composition.last_norm
    if not composition.layers:
        assert again == composition
    assert written(again) == document


def test_standard_keys_have_the_standard_names() -> None:
    document = written(Composition(config_of(FOR_ENGINES["pattern"] | {"softcap": 5.0, "logit_softcap": 4.0})))
    expected = {
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 3,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 4.0,
        "max_position_embeddings": UNSTATED_LENGTH,
        "tie_word_embeddings": True,
    }
    assert {key: document[key] for key in expected} == expected


def test_the_windows_of_layers_are_where_engines_look_for_them() -> None:
    document = written(LAYERED["different"])
    assert document["layer_types"] == ["sliding_attention", "full_attention", "full_attention"]
    assert document["sliding_window"] == 5
    assert document["layers"][0] == {}


def test_keys_that_are_missing_have_the_defaults_of_options() -> None:
    standard = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
    values = {key: written(Composition(config_of({})))[key] for key in standard}
    assert read(values) == Composition(config_of({}))


def test_tokens_of_generation_config_have_precedence() -> None:
    document = written(Composition(config_of(FOR_ENGINES["tokens"])))
    assert read(document, eos_token_id=9, bos_token_id=8).config.stop_tokens == (9,)
    assert read(document, eos_token_id=9, bos_token_id=8).config.start_token == 8


def test_the_length_of_a_scaling_is_the_one_that_is_asked_for() -> None:
    document = written(Composition(config_of(FOR_ENGINES["dynamic"])))
    asked = read_composition(Keys(document, Path("config.json"), length=512))
    assert asked.config.rotary_scaling.length == 512
    assert read(document).config.rotary_scaling.length == 256

    layered = read_composition(Keys(written(LAYERED["scalings"]), Path("config.json"), length=512)).layers
    assert [getattr(layer.options.rotary_scaling, "length", None) for layer in layered] == [None, 512, None]


@pytest.mark.parametrize("name", NATIVE)
def test_what_engines_cannot_run_is_refused_by_its_option(name: str) -> None:
    composition = Composition(config_of(NATIVE[name]))
    options = "position", "num_sinks", "has_head", "feed_forward", "qk_norm_per_head", "sink_logits"
    option = next(word for word in options if word in NATIVE[name])
    assert why_no_engine(composition).startswith(f"{option}: expected ")
    message = f"^model: {option}: expected .* which engines run.*, got .*; only this library runs such a model"
    with pytest.raises(ConfigurationError, match=message):
        write_composition(composition)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("layers", [], "layers"),
        ("layers", {}, "layers"),
        ("layers", [1, 2, 3], "layers"),
        ("layers", [{}, {"heads": 1}, {}], "layers[1].heads"),
        ("layers", [{}, {"vocab_size": 9}, {}], "layers[1].vocab_size"),
        ("layers", [{}, {"d_ff": -1}, {}], "layers[1].d_ff"),
        ("layers", [{}, {"d_ff": 0}, {}], "layers[1].d_ff"),
        ("layers", [{}, {"d_ff": None}, {}], "layers[1].d_ff"),
        ("layers", [{}, {"d_ff": 1 << 40}, {}], "layers[1].d_ff"),
        ("layers", [{}, {"num_heads": 10**30}, {}], "layers[1].num_heads"),
        ("layers", [{}, {"num_heads": True}, {}], "layers[1].num_heads"),
        ("layers", [{}, {"num_heads": 3}, {}], "layers[1].d_model"),
        ("layers", [{}, {"head_dim": 1 << 12}, {}], "layers[1].head_dim"),
        ("layers", [{}, {"scale": "1"}, {}], "layers[1].scale"),
        ("layers", [{}, {"norm": "batch"}, {}], "layers[1].norm"),
        ("layers", [{}, {"activation": "mish"}, {}], "layers[1].activation"),
        ("layers", [{}, {"position": "learned"}, {}], "layers[1].max_length"),
        ("layers", [{}, {"position": "alibi"}, {}], "position"),
        ("layers", [{}, {"qk_norm_options": {}}, {}], "layers[1].qk_norm_options"),
        (
            "layers",
            [{}, {"qk_norm": True, "qk_norm_options": {"norm": "rms"}}, {}],
            "layers[1].qk_norm_options.norm_eps",
        ),
        ("layers", [{}, {"rotary_scaling": {"factor": 2.0}}, {}], "layers[1].rotary_scaling.kind"),
        (
            "layers",
            [{}, {"rotary_scaling": {"kind": "linear", "factor": 1e400}}, {}],
            "layers[1].rotary_scaling.factor",
        ),
        ("layers", [{}, {"rotary_scaling": {"kind": "linear", "factor": 0.5}}, {}], "layers[1].rotary_scaling.factor"),
        ("layers", [{}, {"dropouts": {"attention": 0.1}}, {}], "layers[1].dropouts.branches"),
        (
            "layers",
            [{}, {"dropouts": {"attention": 0.1, "branches": 1, "hidden": 0}}, {}],
            "layers[1].dropouts.branches",
        ),
        ("layers", [{}, {"dropouts": {"all": 0.1}}, {}], "layers[1].dropouts.all"),
        ("last_norm", {"norm": "rms"}, "last_norm"),
        ("head_bias", 1, "head_bias"),
        ("position", "alibi", "position"),
        ("position", 3, "position"),
        ("rotary_dim", 1 << 20, "rotary_dim"),
        ("rotary_length", 0, "rotary_length"),
        ("context_length", -1, "context_length"),
        ("max_position_embeddings", 0, "max_position_embeddings"),
        ("scale", -1.0, "scale"),
        ("scale", 10**400, "scale"),
        ("out_bias", 1, "out_bias"),
        ("norm_placement", "between", "norm_placement"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps"),
        ("dropout", 1.0, "dropout"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings"),
        ("num_hidden_layers", 1 << 9, "num_hidden_layers"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("is_causal", False, "is_causal"),
    ],
)
def test_damage_is_refused_by_key_and_file(key: str, value: object, named: str) -> None:
    document = written(Composition(config_of({}))) | {key: value}
    with pytest.raises(ConfigurationError, match=rf"^config\.json, {re.escape(named)}: (\w+: )?expected "):
        read(document)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_a_size_that_is_missing_is_refused(key: str) -> None:
    document = {name: value for name, value in written(Composition(config_of({}))).items() if name != key}
    with pytest.raises(ConfigurationError, match=f"^config.json, {key}: expected"):
        read(document)
