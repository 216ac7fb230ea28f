"""Recommended options of a checkpoint, compared with transformers' reading of generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tests.checkpoints.folders import small_folder
from tests.checkpoints.theirs import SIZES, VOCAB
from transformer.checkpoints import generation_defaults
from transformer.errors import ConfigurationError, FileFormatError
from transformer.generation import GenerationOptions, History
from transformer.generation.processors import processed

SAMPLE = {"do_sample": True}


def written(folder: Path, **content: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, {"temperature": 0.0}),
        ({"do_sample": None, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}),
        ({"do_sample": False, "top_k": 7, "min_p": 0.1, "typical_p": 0.5}, {"temperature": 0.0}),
        (SAMPLE, {"temperature": 1.0, "top_k": 50}),
        (SAMPLE | {"temperature": 2, "top_k": None}, {"temperature": 2.0, "top_k": 50}),
        (SAMPLE | {"temperature": 0.6, "top_k": 20, "top_p": 0.9}, {"temperature": 0.6, "top_k": 20, "top_p": 0.9}),
        (SAMPLE | {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}, {"temperature": 1.0}),
        (SAMPLE | {"top_k": 0, "top_p": 1.5, "min_p": 0.05}, {"temperature": 1.0, "min_p": 0.05}),
        (SAMPLE | {"top_k": 0, "num_return_sequences": 3}, {"temperature": 1.0, "num_return_sequences": 3}),
        ({"repetition_penalty": 1.05}, {"temperature": 0.0, "repetition_penalty": 1.05}),
        ({"repetition_penalty": 1, "length_penalty": 2.0, "num_beams": 1}, {"temperature": 0.0}),
        (
            {"num_beams": 4, "length_penalty": -0.5, "num_return_sequences": 2},
            {
                "temperature": 0.0,
                "num_beams": 4,
                "length_penalty": -0.5,
                "num_return_sequences": 2,
                "early_stopping": False,
            },
        ),
        ({"num_beams": 3, "early_stopping": True}, {"num_beams": 3, "early_stopping": True}),
        (
            SAMPLE | {"top_k": 0, "num_beams": 2},
            {"temperature": 1.0, "num_beams": 2, "early_stopping": False},
        ),
        (
            {"min_new_tokens": 5, "max_time": 2.5, "forced_bos_token_id": 4, "forced_eos_token_id": [2, 3]},
            {"min_new_tokens": 5, "max_time": 2.5, "forced_bos_token_id": 4, "forced_eos_token_id": (2, 3)},
        ),
        (
            {"no_repeat_ngram_size": 3, "bad_words_ids": [[4], [5, 6]], "sequence_bias": [[[7], -1.5]]},
            {"no_repeat_ngram_size": 3, "bad_words_ids": [[4], [5, 6]], "sequence_bias": [[[7], -1.5]]},
        ),
        ({"no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None, "typical_p": 0.5}, {}),
        (SAMPLE | {"top_k": 0, "typical_p": 0.5}, {"temperature": 1.0, "typical_p": 0.5}),
        (SAMPLE | {"top_k": 0, "typical_p": 1.0}, {"temperature": 1.0}),
        ({"num_beams": 2, "early_stopping": "never", "length_penalty": 1}, {"temperature": 0.0, "num_beams": 2}),
        ({"max_new_tokens": 7, "max_length": 3}, {"temperature": 0.0, "max_new_tokens": 7}),
        ({"max_length": 4096}, {"temperature": 0.0, "max_length": 4096}),
        (
            {"eos_token_id": [5, 6], "pad_token_id": 9, "bos_token_id": 1},
            {"temperature": 0.0, "stop_tokens": (5, 6), "pad_token": 9},
        ),
        ({"max_new_tokens": 7.0, "num_beams": 1.0, "num_return_sequences": 1.0, "do_sample": 0}, {"max_new_tokens": 7}),
        ({"do_sample": 1, "top_k": 0, "eos_token_id": [5.0, 6]}, {"temperature": 1.0, "stop_tokens": (5, 6)}),
        ({"eos_token_id": 5, "pad_token_id": None}, {"temperature": 0.0, "stop_tokens": (5,)}),
        ({"eos_token_id": -1, "cache_implementation": "hybrid", "chat_format": "x", "use_cache": False}, None),
        ({"min_length": 0, "no_repeat_ngram_size": 0, "suppress_tokens": [], "guidance_scale": 1.0}, None),
    ],
)
def test_recommended_options(tmp_path: Path, content: dict, expected: dict | None) -> None:
    expected = {"temperature": 0.0} | (expected or {})
    assert generation_defaults(written(tmp_path, **content)) == expected


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"temperature": 0.5, "top_k": 3},
        {"repetition_penalty": 1.3, "top_p": 0.2},
        SAMPLE,
        SAMPLE | {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        SAMPLE | {"temperature": 0.6, "top_k": 0, "min_p": 0.1},
        SAMPLE | {"temperature": 1.5, "top_p": 0.5},
        SAMPLE | {"top_k": 5, "top_p": 0.9, "min_p": 0.3},
        SAMPLE | {"top_p": 0.9, "typical_p": 0.5},
        {"no_repeat_ngram_size": 1, "sequence_bias": [[[2], 3.0]], "repetition_penalty": 1.3, "bad_words_ids": [[3]]},
    ],
)
def test_scores_are_processed_as_transformers_processes_them(tmp_path: Path, content: dict) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.generation_config = GenerationConfig.from_pretrained(written(tmp_path, **content))
    config, _ = model._prepare_generation_config(None)
    config._eos_token_tensor = None
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (4, 9), generator=generator)
    scores = torch.randn(4, VOCAB, generator=generator) * 3
    theirs = model._get_logits_processor(config, input_ids_seq_length=9, device="cpu")(ids, scores.clone())
    (row,) = GenerationOptions(max_new_tokens=1, **generation_defaults(tmp_path)).rows(1)
    ours = processed([*row.scoring, *row.sampling()], History(ids), scores)
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=0, atol=1e-6)
    assert config.do_sample == bool(generation_defaults(tmp_path)["temperature"])


def test_without_the_file_the_configuration_of_the_model_decides(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | SAMPLE | {"top_k": 4, "eos_token_id": 2}))
    assert generation_defaults(folder) == {"temperature": 1.0, "top_k": 4, "stop_tokens": (2,)}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"do_sample": "yes"}, "do_sample"),
        ({"do_sample": 2}, "do_sample"),
        ({"max_new_tokens": 7.5}, "max_new_tokens"),
        ({"max_length": 1e300}, "max_length"),
        ({"num_beams": float("inf")}, "num_beams"),
        ({"eos_token_id": [1.5]}, "eos_token_id"),
        (SAMPLE | {"temperature": "0.5"}, "temperature"),
        (SAMPLE | {"temperature": 0.0}, "temperature"),
        (SAMPLE | {"temperature": float("nan")}, "temperature"),
        (SAMPLE | {"top_k": -1}, "top_k"),
        (SAMPLE | {"top_k": 2.5}, "top_k"),
        (SAMPLE | {"top_p": [0.5]}, "top_p"),
        (SAMPLE | {"top_p": 0.0}, "top_p"),
        (SAMPLE | {"min_p": 1.5}, "min_p"),
        (SAMPLE | {"typical_p": 0.0}, "typical_p"),
        (SAMPLE | {"eta_cutoff": 0.001}, "eta_cutoff"),
        ({"repetition_penalty": -1}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_length": 10**400}, "max_length"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_beams": 3, "early_stopping": "soon"}, "early_stopping"),
        ({"num_beams": 3, "length_penalty": float("inf")}, "length_penalty"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": 2**70}, "stop_tokens"),
        ({"no_repeat_ngram_size": 0.5}, "no_repeat_ngram_size"),
        ({"suppress_tokens": [4]}, "suppress_tokens"),
        ({"bad_words_ids": [4]}, "bad_words_ids"),
        ({"sequence_bias": {"4": 1.0}}, "sequence_bias"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"max_time": 0.0}, "max_time"),
        ({"forced_eos_token_id": "x"}, "forced_eos_token_id"),
        ({"stop_strings": ["."]}, "stop_strings"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
    ],
)
def test_values_that_cannot_be_honoured_are_refused(tmp_path: Path, content: dict, key: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"generation_config\.json.*{key}"):
        generation_defaults(written(tmp_path, **content))


@pytest.mark.parametrize("content", ["[]", "{", "{" * 10 + '"a":' * 100_000])
def test_what_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(FileFormatError, match=r"generation_config\.json"):
        generation_defaults(tmp_path)


def test_a_folder_without_either_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"config\.json"):
        generation_defaults(tmp_path)
    with pytest.raises(FileNotFoundError):
        generation_defaults(tmp_path / "none")
