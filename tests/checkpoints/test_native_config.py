"""The format `modular_attention_native`: every option is there, and a damaged file is refused by key and file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.checkpoints.compositions import LONG, NATIVE, SIZES
from tests.checkpoints.folders import edit_config
from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer
from transformer.checkpoints import empty_model, load_config, load_model, save_model
from transformer.checkpoints.families import native
from transformer.checkpoints.rope import UNSTATED_LENGTH
from transformer.errors import ConfigurationError
from transformer.models import DecoderOnlyConfig, EncoderTransformer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = DecoderOnlyTransformer(**SIZES, **NATIVE["alibi"], rotary_scaling=LONG)
    save_model(model, tmp_path / "model")
    return tmp_path / "model"


def without(folder: Path, key: str) -> None:
    file = folder / "config.json"
    document = json.loads(file.read_text())
    del document[key]
    file.write_text(json.dumps(document))


def test_every_option_has_its_own_name(folder: Path) -> None:
    document = json.loads((folder / "config.json").read_text())
    options = DecoderOnlyConfig(**SIZES).to_dict()
    others = {"architectures", "dtype", "max_position_embeddings", "model_type"}
    assert document.keys() == options.keys() | others
    assert document["architectures"] == ["DecoderOnlyTransformer"]
    assert document["rotary_scaling"]["kind"] == "longrope"


@pytest.mark.parametrize(
    ("options", "length"),
    [({}, UNSTATED_LENGTH), ({"context_length": 77}, 77), ({"position": "learned", "max_length": 20}, 20)],
)
def test_models_of_every_class_state_their_length(tmp_path: Path, options: dict[str, object], length: int) -> None:
    models = {
        "encoder": EncoderTransformer(31, 16, 4, 12, 1, **options),
        "both": EncoderDecoderTransformer(31, 29, 16, 4, 12, 1, **options),
        "no head": DecoderOnlyTransformer(31, 16, 4, 12, 1, has_head=False, norm_placement="after", **options),
    }
    for name, model in models.items():
        save_model(model, tmp_path / name)
        document = json.loads((tmp_path / name / "config.json").read_text())
        assert (document["model_type"], document["max_position_embeddings"]) == ("modular_attention_native", length)
        assert load_model(tmp_path / name).config == model.config
        # A file without it, as an earlier release wrote it, is read too.
        without(tmp_path / name, "max_position_embeddings")
        assert load_model(tmp_path / name).config == model.config


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("positions", "alibi", "positions"),
        ("hidden_size", 16, "hidden_size"),
        ("num_heads", 3, "d_model"),
        ("num_heads", "4", "num_heads"),
        ("num_heads", None, "num_heads"),
        ("num_heads", 10**30, "num_heads"),
        ("num_heads", 4.0, "num_heads"),
        ("num_layers", 1 << 9, "num_layers"),
        ("num_layers", -1, "num_layers"),
        ("num_sinks", -1, "num_sinks"),
        ("num_sinks", 2, "num_sinks"),
        ("d_ff", 1 << 30, "d_ff"),
        ("d_ff", 0, "d_ff"),
        ("head_dim", 1 << 20, "head_dim"),
        ("relative_buckets", 1 << 20, "relative_buckets"),
        ("position", "rotating", "position"),
        ("activation", "mish", "activation"),
        ("layer_pattern", 3, "layer_pattern"),
        ("layer_pattern", "slow fast", "layer_pattern"),
        ("scale", -0.5, "scale"),
        ("scale", float("inf"), "scale"),
        ("scale", 10**400, "scale"),
        ("dropout", 1.5, "dropout"),
        ("norm_bias", 1, "norm_bias"),
        ("stop_tokens", 3, "stop_tokens"),
        ("stop_tokens", [-3], "stop_tokens"),
        ("stop_tokens", [True], "stop_tokens"),
        ("rotary_scaling", "linear", "rotary_scaling"),
        ("rotary_scaling", {}, "rotary_scaling.kind"),
        ("rotary_scaling", {"kind": "linear"}, "rotary_scaling.factor"),
        ("rotary_scaling", {"kind": "linear", "factor": 2.0, "slope": 1.0}, "rotary_scaling.slope"),
        ("rotary_scaling", {"kind": "linear", "factor": -2.0}, "rotary_scaling.factor"),
        ("layers", [{}], "layers"),
        ("last_norm", {"norm": "rms"}, "last_norm"),
        ("architectures", ["LlamaForCausalLM"], "architectures"),
        ("architectures", None, "architectures"),
        ("architectures", "DecoderOnlyTransformer", "architectures"),
    ],
)
def test_damage_is_refused_by_key_and_file(folder: Path, key: str, value: object, named: str) -> None:
    edit_config(folder, **{key: value})
    expected = f"^{re.escape(str(folder / 'config.json'))}, {re.escape(named)}: expected "
    for read in (load_config, empty_model, load_model):
        with pytest.raises(ConfigurationError, match=expected):
            read(folder)


@pytest.mark.parametrize("key", ["vocab_size", "position", "dropout", "stop_tokens", "has_head"])
def test_an_option_that_is_missing_is_refused(folder: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(folder, key)
    with pytest.raises(ConfigurationError, match=f", {key}: expected a value, as every option is given here"):
        load_config(folder)
    if key != "vocab_size":
        monkeypatch.setattr(native, "LATER", frozenset({key}))
        assert getattr(load_config(folder), key) == getattr(DecoderOnlyConfig(**SIZES), key)


def test_options_of_another_class_are_refused(folder: Path) -> None:
    for architecture in ("EncoderTransformer", "EncoderDecoderTransformer", "UMT5Model"):
        edit_config(folder, architectures=[architecture])
        with pytest.raises(ConfigurationError, match=f"{folder / 'config.json'}, .*: expected no such key"):
            load_config(folder)


def test_sizes_beyond_the_limits_are_refused_before_anything_is_built(folder: Path) -> None:
    edit_config(folder, d_model=1 << 20, vocab_size=1 << 28)
    with pytest.raises(ConfigurationError, match="expected a model of at most 8,796,093,022,208 parameters"):
        load_config(folder)
    edit_config(folder, vocab_size=31, position="rotary")
    with pytest.raises(ConfigurationError, match="expected rotary heads of at most 2,048, got 262,144"):
        load_config(folder)


def test_the_length_of_a_scaling_is_the_one_that_is_asked_for(folder: Path) -> None:
    assert load_config(folder).rotary_scaling == LONG
    assert load_config(folder, length=32).rotary_scaling.length == 32
    assert load_model(folder, length=32).config.rotary_scaling.length == 32
