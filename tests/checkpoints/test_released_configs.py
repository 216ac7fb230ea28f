"""Keys of config.json as published models have them, with smaller sizes: read as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoints.theirs import VOCAB, ids
from tests.peers.models import fill
from transformer.checkpoints import load_model

SMALL = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
NEOX = {
    **SMALL,
    "model_type": "gpt_neox",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "use_cache": True,
}
FALCON = {
    **SMALL,
    "model_type": "falcon",
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "layer_norm_epsilon": 1e-05,
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_kv_heads": 6,
    "parallel_attn": True,
}
STABLELM = {
    **SMALL,
    "model_type": "stablelm",
    "hidden_act": "silu",
    "intermediate_size": 40,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 4096,
    "num_key_value_heads": 6,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "use_qkv_bias": False,
}
RELEASED: dict[str, dict[str, object]] = {
    "gpt-neox-20b": NEOX | {"hidden_act": "gelu_fast", "attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0},
    "pythia": NEOX | {"hidden_act": "gelu", "tie_word_embeddings": False, "use_parallel_residual": True},
    "RedPajama-INCITE": NEOX | {"hidden_act": "gelu", "rotary_pct": 1.0, "use_parallel_residual": False},
    "falcon-7b": FALCON,
    "falcon-40b": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-11B": FALCON
    | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "rope_theta": 500042.0}
    | {"activation": "gelu", "ff_factor": 4, "ffn_hidden_size": 192, "tie_word_embeddings": False},
    "phi-1_5": {
        **SMALL,
        "model_type": "phi",
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "hidden_act": "gelu_new",
        "intermediate_size": 40,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_key_value_heads": None,
        "partial_rotary_factor": 0.5,
        "qk_layernorm": False,
        "resid_pdrop": 0.0,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "stablelm-3b-4e1t": STABLELM,
    "stablelm-2-1_6b": STABLELM | {"use_qkv_bias": True, "use_parallel_residual": False, "qk_layernorm": False},
    "starcoder2": {
        **SMALL,
        "model_type": "starcoder2",
        "activation_function": "gelu",
        "attention_softmax_in_fp32": True,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 40,
        "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 16384,
        "mlp_type": "default",
        "norm_epsilon": 1e-05,
        "norm_type": "layer_norm",
        "num_key_value_heads": 2,
        "residual_dropout": 0.1,
        "rope_theta": 999999.4420358813,
        "sliding_window": 5,
        "use_bias": True,
    },
    "opt": {
        **SMALL,
        "model_type": "opt",
        "_remove_final_layer_norm": False,
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "ffn_dim": 40,
        "layerdrop": 0.0,
        "max_position_embeddings": 128,
        "pad_token_id": 1,
        "prefix": "</s>",
        "word_embed_proj_dim": 48,
    },
    "bloom": {
        "model_type": "bloom",
        "vocab_size": VOCAB,
        "n_embed": 48,
        "n_layer": 2,
        "num_attention_heads": 6,
        "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "layer_norm_epsilon": 1e-05,
        "masked_softmax_fusion": True,
        "n_inner": None,
        "offset_alibi": 100,
        "pretraining_tp": 4,
        "seq_length": 2048,
        "skip_bias_add": True,
        "slow_but_exact": False,
    },
}


@pytest.mark.parametrize("name", RELEASED)
@torch.no_grad()
def test_a_released_config(name: str, tmp_path: Path) -> None:
    document = json.dumps(RELEASED[name])
    (tmp_path / "config.json").write_text(document)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.float32).eval()
    fill(theirs)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(document)
    ours, prompt = load_model(tmp_path), ids(2, 14)
    torch.testing.assert_close(ours(prompt), theirs(prompt).logits, rtol=0, atol=2e-5)
    tokens = theirs.generate(prompt, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.generate(prompt, max_new_tokens=9, stop_tokens=()).tolist() == tokens.tolist()
