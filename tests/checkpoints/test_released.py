"""Configurations as they were released, with smaller sizes: read as transformers reads them, or refused by the key."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoints.folders import edit_config
from tests.checkpoints.released import RELEASED
from tests.checkpoints.theirs import ids, saved
from transformer import DecoderOnlyTransformer
from transformer.checkpoints import load_config, load_model
from transformer.errors import ConfigurationError


@pytest.fixture(scope="module", params=RELEASED)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a model that transformers makes of the released config.json, beside that file itself."""
    path = tmp_path_factory.mktemp(request.param)
    document = json.dumps(RELEASED[request.param])
    (path / "config.json").write_text(document)
    saved(AutoConfig.from_pretrained(path), path)
    (path / "config.json").write_text(document)
    return path


def logits(model: torch.nn.Module, length: int) -> torch.Tensor:
    with torch.no_grad():
        out = model(ids(2, length))
    return out if isinstance(model, DecoderOnlyTransformer) else out.logits


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def test_a_released_configuration(folder: Path) -> None:
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), load_model(folder)
    assert logits(theirs, 24).std() > 0.01
    assert_close(logits(ours, 24), logits(theirs, 24))
    prompt = ids(2, 14)
    asked = {"max_new_tokens": 9, "no_repeat_ngram_size": 2}
    told = theirs.generate(prompt, do_sample=False, eos_token_id=None, pad_token_id=0, **asked)
    assert ours.generate(prompt, stop_tokens=(), **asked).tolist() == told.tolist()


@pytest.mark.parametrize("folder", ["phi3"], indirect=True)
def test_longrope_on_both_sides_of_its_first_length(folder: Path) -> None:
    # transformers looks at the length of the text, load_model is told the longest.
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    short, long = load_model(folder), load_model(folder, length=70)
    assert load_config(folder).rotary_dim is not None
    assert_close(logits(long, 50), logits(theirs, 50))
    assert not torch.allclose(logits(short, 50), logits(theirs, 50), atol=1e-2)
    prompt = ids(2, 40)
    told = theirs.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert long.generate(prompt, max_new_tokens=24, stop_tokens=()).tolist() == told.tolist()


KINDS = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
REFUSED: list[tuple[str, str, dict[str, object]]] = [
    ("gemma3_text", "attn_logit_softcapping", {"attn_logit_softcapping": 50.0}),
    ("gemma3_text", "use_bidirectional_attention", {"use_bidirectional_attention": True}),
    ("gemma3_text", "sliding_window", {"sliding_window": None}),
    ("gemma3_text", "sliding_window_pattern", {"sliding_window_pattern": 0}),
    ("gemma3_text", "rope_parameters.rope_type", {"rope_parameters": {"rope_type": "default"}}),
    ("gemma3_text", "rope_scaling", {"rope_parameters": KINDS}),
    (
        "gemma3_text",
        "rope_parameters.sliding_attention.rope_type",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
    ),
    ("gemma3_text", "partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("gemma3_text", "model_type", {"model_type": "gemma3"}),
    ("phi3", "partial_rotary_factor", {"partial_rotary_factor": 0.9}),
    ("phi3", "partial_rotary_factor", {"partial_rotary_factor": 1.5}),
    ("phi3", "partial_rotary_factor", {"partial_rotary_factor": 0.1}),
    ("phi3", "rope_scaling.type", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("phi3", "original_max_position_embeddings", {"original_max_position_embeddings": 0.5}),
    ("olmo2", "partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("smollm3", "no_rope_layers", {"no_rope_layers": [1, 1, 0]}),
    ("smollm3", "no_rope_layers", {"no_rope_layers": [True] * 4}),
    ("smollm3", "no_rope_layer_interval", {"no_rope_layers": None, "no_rope_layer_interval": 0}),
    ("smollm3", "layer_types", {"layer_types": ["sliding_attention"] * 4}),
    ("granite", "logits_scaling", {"logits_scaling": 0.0}),
    ("granite", "residual_multiplier", {"residual_multiplier": -1.0}),
    ("granite", "attention_multiplier", {"attention_multiplier": "1"}),
]


@pytest.mark.parametrize(("kind", "key", "changes"), REFUSED, ids=str)
def test_what_would_change_the_result_is_refused(kind: str, key: str, changes: dict, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[kind]))
    load_config(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ConfigurationError, match=rf"^{tmp_path / 'config.json'}, {re.escape(key)}: expected"):
        load_config(tmp_path)
