"""Tiny models of transformers with random weights, saved by transformers itself."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tests.peers.models import fill

VOCAB, LENGTH = 67, 40

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GPT2_SIZES = {"vocab_size": VOCAB, "n_layer": 3, "n_positions": 128, "bos_token_id": None, "eos_token_id": None}

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


def rope(kind: str = "default", base: float = 500.0, **parameters: object) -> dict[str, object]:
    return {"rope_type": kind, "rope_theta": base, **parameters}


CASES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, rope_parameters=rope()),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "llama, multi-query": LlamaConfig(**SIZES | {"num_key_value_heads": 1}, head_dim=10),
    "llama, multi-head": LlamaConfig(**SIZES | {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "llama, linear": LlamaConfig(**SIZES, rope_parameters=rope("linear", factor=3.0)),
    "llama, dynamic": LlamaConfig(**SIZES, rope_parameters=rope("dynamic", factor=2.0)),
    "llama, llama3": LlamaConfig(**SIZES, rope_parameters=rope("llama3", **LLAMA3)),
    "llama, yarn": LlamaConfig(**SIZES, rope_parameters=rope("yarn", **YARN)),
    "llama, yarn, mscale": LlamaConfig(
        **SIZES, rope_parameters=rope("yarn", **YARN, mscale=0.7, mscale_all_dim=1.0, beta_fast=8.0, truncate=False)
    ),
    "gemma": GemmaConfig(**SIZES, head_dim=6),
    "gemma, multi-query": GemmaConfig(**SIZES | {"num_key_value_heads": 1}, head_dim=14),
    "gemma, untied": GemmaConfig(**SIZES, head_dim=8, tie_word_embeddings=False, attention_bias=True),
    "gpt2": GPT2Config(**GPT2_SIZES, n_embd=24, n_head=4),
    "gpt2, odd heads": GPT2Config(**GPT2_SIZES, n_embd=21, n_head=3, n_inner=50),
    "gpt2, untied": GPT2Config(**GPT2_SIZES, n_embd=20, n_head=2, tie_word_embeddings=False),
    "mistral": MistralConfig(**SIZES, sliding_window=7),
    "mistral, window of 2": MistralConfig(**SIZES, sliding_window=2, head_dim=10, rope_parameters=rope()),
    "mistral, no window": MistralConfig(**SIZES, sliding_window=None, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, windows": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2, tied": Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters=rope("yarn", **YARN)),
    "qwen3": Qwen3Config(**SIZES, head_dim=10),
    "qwen3, biases": Qwen3Config(**SIZES, head_dim=6, attention_bias=True, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, head_dim=10, sliding_window=6, query_pre_attn_scalar=7),
    "gemma2, no caps": Gemma2Config(
        **SIZES | {"num_key_value_heads": 1},
        head_dim=8,
        sliding_window=9,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
}


def make(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of this configuration in which no tensor is zeros, ones, or all small."""
    # A copy: a model keeps its configuration, and changes it, for example in `set_attn_implementation`.
    model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.float32).eval()
    fill(model, 0.0 if config.model_type.startswith("gemma") else 1.0, seed)
    model.generation_config.pad_token_id = 0
    return model


def saved(config: PreTrainedConfig, folder: Path, **options: object) -> PreTrainedModel:
    """That model, also saved into a folder."""
    model = make(config)
    model.save_pretrained(folder, **options)
    return model


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
