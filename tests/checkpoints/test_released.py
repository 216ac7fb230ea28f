"""Configurations as they were released, with smaller sizes: read as transformers reads them, or refused by the key."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoints.folders import edit_config
from tests.checkpoints.theirs import ids, saved
from transformer import DecoderOnlyTransformer
from transformer.checkpoints import load_config, load_model
from transformer.errors import ConfigurationError

SIZES = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 36,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "bos_token_id": 2,
    "eos_token_id": [1, 7],
    "pad_token_id": 0,
}
LLAMA_SIZES = SIZES | {"hidden_act": "silu", "mlp_bias": False, "rms_norm_eps": 1e-5, "rope_scaling": None}
RELEASED: dict[str, dict[str, object]] = {
    "gemma3_text": SIZES
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 10,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 32768,
        "query_pre_attn_scalar": 5,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000,
        "sliding_window": 4,
        "sliding_window_pattern": 2,
    },
    "phi3": LLAMA_SIZES
    | {
        "architectures": ["Phi3ForCausalLM"],
        "full_attn_mod": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0,
        "rope_scaling": {"long_factor": [1.0, 2.0, 9.0], "short_factor": [1.0, 1.2, 1.5], "type": "longrope"},
        "rope_theta": 100.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    },
    "olmo2": LLAMA_SIZES | {"architectures": ["Olmo2ForCausalLM"], "rope_theta": 500, "tie_word_embeddings": False},
    "smollm3": LLAMA_SIZES
    | {
        "architectures": ["SmolLM3ForCausalLM"],
        "layer_types": ["full_attention"] * 4,
        "max_window_layers": 28,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "pretraining_tp": 2,
        "rope_theta": 500.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "granite": LLAMA_SIZES
    | {
        "architectures": ["GraniteForCausalLM"],
        "attention_dropout": 0.1,
        "attention_multiplier": 0.3125,
        "embedding_multiplier": 12.0,
        "logits_scaling": 16.0,
        "residual_multiplier": 0.22,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="module", params=RELEASED)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a model that transformers makes of the released config.json, beside that file itself."""
    path = tmp_path_factory.mktemp(request.param)
    document = json.dumps(RELEASED[request.param] | {"model_type": request.param})
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
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert logits(theirs, 24).std() > 0.01
    assert_close(logits(load_model(folder), 24), logits(theirs, 24))
    if load_config(folder).rotary_dim is not None:
        # Phi-3: transformers looks at the length of the text, load_model is told the longest.
        short, long = load_model(folder), load_model(folder, length=70)
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
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[kind] | {"model_type": kind}))
    load_config(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ConfigurationError, match=rf"^{tmp_path / 'config.json'}, {re.escape(key)}: expected"):
        load_config(tmp_path)
