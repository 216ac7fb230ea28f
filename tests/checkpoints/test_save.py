"""Saved models: atomic, in the format of the right family, without loss of existing files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from tests.checkpoints.folders import small_model
from transformer import MultiHeadAttention
from transformer.blocks import BlockStack, EncoderBlock, FeedForward, RMSNorm
from transformer.checkpoints import load_model, save_model
from transformer.checkpoints.rope import UNSTATED_LENGTH
from transformer.errors import ArgumentError, ConfigurationError
from transformer.positions import LongRoPEScaling, YaRNScaling

GEMMA2 = {
    "norm_unit_offset": True,
    "norm_placement": "both",
    "activation": "gelu_tanh",
    "embedding_scale": 8**0.5,
    "softcap": 20.0,
    "window_size": 3,
    "layer_pattern": "full sliding",
}
GPT2 = {
    "position": "learned",
    "max_length": 20,
    "norm": "layer",
    "attention_bias": True,
    "feed_forward": "plain",
    "feed_forward_bias": True,
    "activation": "gelu",
}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"attention": "gqa", "num_groups": 2, "head_dim": 4, "rotary_dim": 4, "scale": 0.5}),
        ("llama", {"attention": "mqa", "head_dim": 6, "dropout": 0.3, "start_token": 1, "stop_tokens": (2, 3)}),
        ("mistral", {"window_size": 3}),
        ("qwen2", {"attention_bias": True, "out_bias": False}),
        ("qwen3", {"qk_norm": True, "window_size": 3, "layer_pattern": "sliding full"}),
        ("gemma", {"norm_unit_offset": True, "activation": "gelu_tanh", "embedding_scale": 8**0.5}),
        ("gemma2", GEMMA2),
        ("gpt2", GPT2),
    ],
)
def test_a_model_is_written_as_the_family_that_describes_it(tmp_path: Path, family: str, options: dict) -> None:
    model = small_model(**options)
    save_model(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == family
    loaded, ids = load_model(tmp_path / "model"), torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    assert torch.equal(loaded(ids), model(ids))
    again = tmp_path / "again"
    save_model(loaded, again)
    assert (again / "config.json").read_text() == (tmp_path / "model" / "config.json").read_text()


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(2, 2),
        BlockStack([EncoderBlock(MultiHeadAttention(8, 2), FeedForward(8, 8), RMSNorm)]),
        None,
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_refused(module: nn.Module | None, tmp_path: Path) -> None:
    expected = rf"^model: expected one of \['DecoderOnlyTransformer', .* got {type(module).__name__}; "
    with pytest.raises(ConfigurationError, match=expected):
        save_model(module, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_anything_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_model(small_model(), tmp_path / "model")  # an empty one is used
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    for target in (tmp_path / "model", tmp_path / "model" / "config.json"):
        with pytest.raises(FileExistsError, match="expected a folder that is new or empty"):
            save_model(small_model(), target)
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before


def test_folders_above_are_made_and_nothing_else_is_left(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "a" / "b")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    files = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("shard_bytes", [1, 700, 1500, 10**9])
def test_shards_hold_each_tensor_once_and_no_more_than_they_may(tmp_path: Path, shard_bytes: int) -> None:
    model = small_model()
    save_model(model, tmp_path / "model", shard_bytes=shard_bytes)
    shards = [load_file(file) for file in (tmp_path / "model").glob("*.safetensors")]
    assert all(len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= shard_bytes for shard in shards)
    assert sum(map(len, shards)) == len(list(model.parameters()))
    loaded = load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_a_model_with_modules_of_ones_own_is_told_what_keeps_it(tmp_path: Path) -> None:
    model = small_model()
    model.decoder.blocks[1].attention.q_proj = nn.Sequential(model.decoder.blocks[1].attention.q_proj)
    told = (
        r"blocks\.1\.attention\.q_proj: expected .*; save any other model with torch.save\(model.state_dict\(\), file\)"
    )
    with pytest.raises(ConfigurationError, match=told):
        save_model(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    torch.save(model.state_dict(), tmp_path / "file")
    again = deepcopy(model)
    again.load_state_dict(torch.load(tmp_path / "file"))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("shard_bytes", [0, -1, 1.5, True, None])
def test_a_shard_of_no_size_is_refused(tmp_path: Path, shard_bytes: object) -> None:
    with pytest.raises(ArgumentError, match="shard_bytes: expected"):
        save_model(small_model(), tmp_path / "model", shard_bytes=shard_bytes)


def test_what_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = 0

    def fail_at_last(handle: int) -> None:
        nonlocal synced
        synced += 1
        if synced == 4:
            raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail_at_last)
    with pytest.raises(OSError, match="disk full"):
        save_model(small_model(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_values_that_transformers_would_make_up_are_written(tmp_path: Path) -> None:
    """Its classes have defaults for keys that config.json leaves out."""
    save_model(small_model(context_length=99, rotary_base=77.0, norm_eps=1e-3), tmp_path / "model")
    theirs = AutoConfig.from_pretrained(tmp_path / "model")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (None, None, None)
    assert (theirs.max_position_embeddings, theirs.rms_norm_eps, theirs.dtype) == (99, 1e-3, torch.float32)
    assert theirs.rope_parameters["rope_theta"] == 77.0


def test_a_loaded_model_is_written_again_while_its_first_folder_is_gone(folder: Path) -> None:
    model = load_model(folder)
    expected = load_file(folder / "model.safetensors")
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    for file in folder.iterdir():
        file.unlink()
    save_model(model, folder)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(folder / "model.safetensors").items())


SAVING = """
import itertools, sys
import torch
from pathlib import Path
from transformer import DecoderOnlyTransformer
from transformer.checkpoints import save_model

model = DecoderOnlyTransformer(512, 64, 2, 256, 6)
for number in itertools.count():
    save_model(model, Path(sys.argv[1]) / str(number), shard_bytes=200_000)
    print(number, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_process_that_is_killed_leaves_whole_folders_only(tmp_path: Path) -> None:
    for written in (1, 4):
        place = tmp_path / str(written)
        with subprocess.Popen([sys.executable, "-c", SAVING, str(place)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(written):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)  # while it writes the next one
        folders = list(place.glob("[0-9]*"))
        assert len(folders) >= written
        for folder in folders:
            load_model(folder)


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, UNSTATED_LENGTH),
        ({"context_length": 99}, 99),
        ({"window_size": 3}, UNSTATED_LENGTH),
        (GEMMA2, UNSTATED_LENGTH),
        ({"rotary_scaling": YaRNScaling(4.0, 64)}, 256),
        ({"rotary_scaling": YaRNScaling(4.0, 64), "context_length": 99}, 99),
        ({"rotary_scaling": LongRoPEScaling([1.0, 2.0], [2.0, 3.0], 64, 64, factor=4.0)}, 256),
    ],
)
def test_a_longest_sequence_is_always_written(tmp_path: Path, options: dict, length: int) -> None:
    """Readers make up 2,048 where there is none; a model without a context length stays one."""
    save_model(small_model(**options), tmp_path / "model")
    theirs = AutoConfig.from_pretrained(tmp_path / "model")
    assert theirs.max_position_embeddings == length
    document = json.loads((tmp_path / "model" / "config.json").read_text())
    assert ("context_length" in document) == ("context_length" not in options)
    assert load_model(tmp_path / "model").config.context_length == options.get("context_length")


def test_the_keys_of_a_published_family_are_as_ever(tmp_path: Path) -> None:
    save_model(small_model(context_length=99, stop_tokens=(2,)), tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": None,
        "dtype": "float32",
        "eos_token_id": 2,
        "head_dim": 4,
        "hidden_act": "silu",
        "hidden_size": 8,
        "intermediate_size": 12,
        "max_position_embeddings": 99,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": 11,
    }
