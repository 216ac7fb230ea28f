"""Invalid values in config.json: refused with key and file, before a tensor is read."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints.folders import edit_config, small_folder
from transformer.checkpoints import empty_model, load_config, load_model
from transformer.errors import AttentionError, ConfigurationError, FileFormatError

NAN = float("nan")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 0),
        ("num_attention_heads", 3),
        ("num_attention_heads", -2),
        ("num_attention_heads", 2.0),
        ("num_attention_heads", True),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 0),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", "2"),
        ("vocab_size", 0),
        ("vocab_size", 10**30),
        ("vocab_size", None),
        ("hidden_size", [8]),
        ("intermediate_size", {"a": 1}),
        ("head_dim", 3),
        ("head_dim", 10**6),
        ("rms_norm_eps", NAN),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", 10**400),
        ("rms_norm_eps", "1e-6"),
        ("hidden_act", "mish"),
        ("hidden_act", ["silu"]),
        ("attention_bias", 1),
        ("tie_word_embeddings", "no"),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, 2.5]),
        ("pad_token_id", {}),
        ("max_position_embeddings", 0),
        ("quantization_config", {"bits": 4}),
        ("model_type", "no such family"),
        ("model_type", None),
        ("model_type", ["llama"]),
        ("rope_parameters", "linear"),
        ("rope_scaling", [1]),
    ],
)
def test_a_value_is_refused_by_its_key_and_file(folder: Path, key: str, value: object) -> None:
    edit_config(folder, **{key: value})
    with pytest.raises(ConfigurationError, match=f"{folder / 'config.json'}.*{key}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("key", "rope"),
    [
        ("rope_type", {"rope_type": "no such rule"}),
        ("rope_theta", {"rope_type": "default", "rope_theta": NAN}),
        ("factor", {"rope_type": "linear"}),
        ("factor", {"rope_type": "linear", "factor": 0.5}),
        ("factor", {"type": "dynamic", "factor": "2"}),
        ("low_freq_factor", {"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 4.0}),
        ("low_freq_factor", {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}),
        ("max_position_embeddings", {"rope_type": "yarn", "factor": 2.0}),
        ("truncate", {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "truncate": 1}),
        ("beta_fast", {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "beta_fast": 1e308}),
        ("beta_slow", {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "beta_slow": 5e-324}),
        ("short_factor", {"rope_type": "longrope", "long_factor": [1.0]}),
        ("long_factor", {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [1.0, NAN]}),
        ("partial_rotary_factor", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ],
)
def test_a_scaling_is_refused_by_its_key_and_file(folder: Path, key: str, rope: dict) -> None:
    length = None if key == "max_position_embeddings" else 8
    edit_config(folder, rope_parameters=rope, max_position_embeddings=length)
    with pytest.raises(ConfigurationError, match=f"{folder / 'config.json'}.*{key}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("layer_types", {"layer_types": ["sliding_attention"]}),
        ("layer_types", {"layer_types": ["sliding_attention", "chunked_attention"]}),
        ("layer_types", {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": False}),
        ("sliding_window", {"sliding_window": -1, "use_sliding_window": True}),
        ("use_sliding_window", {"use_sliding_window": "yes"}),
        ("max_window_layers", {"max_window_layers": -1, "use_sliding_window": True, "sliding_window": 4}),
    ],
)
def test_windows_are_refused_by_their_key(folder: Path, key: str, changes: dict) -> None:
    edit_config(folder, model_type="qwen2", **changes)
    with pytest.raises(ConfigurationError, match=f"config.json, {key}"):
        load_config(folder)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", '{"vocab_size": }', "\xff\xfe", "[" * 100_000, '{"a":' * 100_000, "9" * 10_000],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_no_object_is_refused_by_its_file(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(FileFormatError, match=str(folder / name)):
        load_config(folder)


def test_another_family_is_told_before_those_that_are_supported(folder: Path) -> None:
    edit_config(folder, model_type="mamba")
    expected = r"config.json, model_type: expected a supported family, got 'mamba'; these are bart, .*, xlm-roberta$"
    with pytest.raises(ConfigurationError, match=expected):
        load_config(folder)


def test_deep_values_are_shown_shortly(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ' + "[" * 400 + "]" * 400 + "}")
    with pytest.raises(ConfigurationError, match="model_type") as raised:
        load_config(folder)
    assert len(str(raised.value)) < 1000


def test_an_enormous_file_is_not_read(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FileFormatError, match="bytes"):
        load_config(folder)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
def test_another_encoding_is_refused_as_the_reference_does(folder: Path, encoding: str) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text, encoding=encoding)
    with pytest.raises(FileFormatError, match=f"{folder / 'config.json'}: expected a JSON object"):
        load_config(folder)


T5 = {"model_type": "t5", "vocab_size": 32, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 32, "num_layers": 1}
# Other names of the same sizes, which must not say something else.
T5 |= dict.fromkeys(("hidden_size", "num_attention_heads", "num_hidden_layers", "head_dim"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head_dim": 2**12}, "head_dim: expected a whole number from 1 to 2048, got 4096"),
        ({"num_hidden_layers": 257}, "num_hidden_layers: expected a whole number from 1 to 256, got 257"),
        ({"hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 256}, "8,796,093,022,208 parameters"),
        ({"hidden_size": 2**20, "vocab_size": 2**28}, "8,796,093,022,208 parameters"),
        ({**T5, "num_layers": 4096}, "num_layers: expected a whole number from 1 to 256"),
        ({**T5, "num_decoder_layers": 2**28}, "num_decoder_layers: expected a whole number from 1 to 256"),
        ({**T5, "relative_attention_num_buckets": 2**20}, "num_buckets: expected a whole number from 1 to 4096"),
        ({**T5, "d_kv": 2**28, "num_heads": 2**14}, "8,796,093,022,208 parameters"),
        ({**T5, "d_kv": 2**28, "d_model": 2**28, "d_ff": 2**28}, "8,796,093,022,208 parameters"),
    ],
)
@pytest.mark.parametrize("load", [load_config, empty_model, load_model])
def test_sizes_beyond_any_model_are_refused_before_anything_is_built(
    folder: Path, changes: dict, said: str, load: Callable[[Path], object]
) -> None:
    edit_config(folder, **{"head_dim": 4} | changes)
    with pytest.raises(ConfigurationError, match=f"{folder / 'config.json'}.*{said}"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 2**28}, "hidden_size: expected .* 2048 times num_attention_heads=2, .* got 268435456"),
        ({"hidden_size": 9}, "hidden_size: expected a multiple of num_attention_heads=2, .* got 9"),
        ({"model_type": "qwen2"}, r"num_key_value_heads: .*num_attention_heads=2 \(32 if it is missing\), got None"),
        ({"model_type": "gpt2", "n_embd": 2**27, "n_head": 2, "n_layer": 1}, "n_embd: .* 67108864, got 134217728"),
    ],
)
def test_a_size_that_follows_from_another_key_is_refused_by_that_key(folder: Path, changes: dict, said: str) -> None:
    document = json.loads((folder / "config.json").read_text()) | changes
    for key in ("head_dim", "num_key_value_heads"):
        document.pop(key)
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(ConfigurationError, match=f"{folder / 'config.json'}, {said}$"):
        load_config(folder)


def test_a_long_distance_costs_no_table(folder: Path) -> None:
    """Its table would have half a billion entries."""
    edit_config(folder, **T5, relative_attention_max_distance=2**28)
    tracemalloc.start()
    assert empty_model(folder).config.relative_max_distance == 2**28
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_missing_keys_are_refused_by_name(folder: Path) -> None:
    document = json.loads((folder / "config.json").read_text())
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        left = {name: value for name, value in document.items() if name != key}
        (folder / "config.json").write_text(json.dumps(left))
        with pytest.raises(ConfigurationError, match=f"{key}: .*None"):
            load_config(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_at_any_key_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "any value"
    if not folder.exists():
        small_folder(folder)
    original = (folder / "config.json").read_text()
    kind = data.draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gpt2"]))
    document = json.loads(original) | {"model_type": kind, "use_sliding_window": True}
    document |= {"n_embd": 8, "n_head": 2, "n_layer": 2, "n_inner": 12}
    others = [
        "sliding_window",
        "layer_types",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "n_positions",
    ]
    document[data.draw(st.sampled_from([*document, *others]))] = data.draw(JSON)
    (folder / "config.json").write_text(json.dumps(document))
    refused = str(folder)
    try:
        load_model(folder)
    except AttentionError as error:
        refused = str(error)
    finally:
        (folder / "config.json").write_text(original)
    assert str(folder) in refused
