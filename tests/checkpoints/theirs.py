"""Tiny models of transformers with random weights, saved by transformers itself."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
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
MHA_SIZES = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
FALCON_SIZES = {name: value for name, value in MHA_SIZES.items() if name != "intermediate_size"}
OPT_SIZES = FALCON_SIZES | {"ffn_dim": 36}
BLOOM_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "n_layer": 3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GPT2_SIZES = {"vocab_size": VOCAB, "n_layer": 3, "n_positions": 128, "bos_token_id": None, "eos_token_id": None}

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
# Not one, so that each of them acts, nor the default scale of scores.
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "logits_scaling": 3.0,
}


def rope(kind: str = "default", base: float = 500.0, **parameters: object) -> dict[str, object]:
    return {"rope_type": kind, "rope_theta": base, **parameters}


LOCAL = {"sliding_attention": rope(base=20.0)}
PHI_SIZES = SIZES | {"hidden_size": 48, "num_attention_heads": 6}
LONGROPE = rope("longrope", short_factor=[1.0, 1.3], long_factor=[1.5, 4.0], partial_rotary_factor=0.5)

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
    "gemma3": Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 4},
        head_dim=10,
        sliding_window=6,
        sliding_window_pattern=2,
        query_pre_attn_scalar=7,
        rope_parameters=LOCAL | {"full_attention": rope("linear", 900.0, factor=3.0)},
    ),
    "gemma3, untied": Gemma3TextConfig(
        **SIZES,
        head_dim=6,
        sliding_window=9,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        final_logit_softcapping=5.0,
        tie_word_embeddings=False,
    ),
    "granite": GraniteConfig(**SIZES, **GRANITE),
    "granite, tied": GraniteConfig(
        **SIZES, **GRANITE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rope_parameters=rope()
    ),
    "phi": PhiConfig(**PHI_SIZES | {"num_key_value_heads": None}, rope_parameters=rope(partial_rotary_factor=0.75)),
    "phi, grouped": PhiConfig(
        **SIZES,
        hidden_act="relu",
        tie_word_embeddings=True,
        rope_parameters=rope("linear", factor=3.0, partial_rotary_factor=0.34),
    ),
    "phi3": Phi3Config(**PHI_SIZES, rope_parameters=rope(partial_rotary_factor=0.5)),
    "phi3, window": Phi3Config(
        **PHI_SIZES, sliding_window=7, tie_word_embeddings=True, rope_parameters=rope(partial_rotary_factor=0.5)
    ),
    "phi3, longrope": Phi3Config(**PHI_SIZES, original_max_position_embeddings=100, rope_parameters=LONGROPE),
    "olmo2": Olmo2Config(**SIZES, rope_parameters=rope()),
    "olmo2, multi-head, tied": Olmo2Config(
        **SIZES | {"num_key_value_heads": 4}, attention_bias=True, tie_word_embeddings=True
    ),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layer_interval=2, rope_parameters=rope()),
    "smollm3, windows": SmolLM3Config(
        **SIZES,
        no_rope_layers=[0, 1, 1],
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        tie_word_embeddings=False,
        attention_bias=True,
    ),
    "gpt2": GPT2Config(**GPT2_SIZES, n_embd=24, n_head=4),
    "gpt2, odd heads": GPT2Config(**GPT2_SIZES, n_embd=21, n_head=3, n_inner=50),
    "gpt2, untied": GPT2Config(**GPT2_SIZES, n_embd=20, n_head=2, tie_word_embeddings=False),
    "mistral": MistralConfig(**SIZES, sliding_window=7),
    "mistral, window of 2": MistralConfig(**SIZES, sliding_window=2, head_dim=10, rope_parameters=rope()),
    "mistral, no window": MistralConfig(**SIZES, sliding_window=None, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2, rope_parameters=rope(base=1e6)),
    "mixtral, window": MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=3, sliding_window=7),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, windows": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2, tied": Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters=rope("yarn", **YARN)),
    "qwen3": Qwen3Config(**SIZES, head_dim=10),
    "qwen3, biases": Qwen3Config(**SIZES, head_dim=6, attention_bias=True, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, head_dim=10, moe_intermediate_size=20, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True
    ),
    "qwen3_moe, probabilities": Qwen3MoeConfig(
        **SIZES,
        moe_intermediate_size=12,
        num_experts=5,
        num_experts_per_tok=2,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=7,
    ),
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
    "stablelm": StableLmConfig(**SIZES, use_qkv_bias=True, rope_parameters=rope(partial_rotary_factor=0.7)),
    "stablelm, parallel": StableLmConfig(
        **SIZES,
        use_parallel_residual=True,
        tie_word_embeddings=True,
        rope_parameters=rope("yarn", **YARN, partial_rotary_factor=0.34),
    ),
    "starcoder2": Starcoder2Config(**SIZES, sliding_window=7),
    "starcoder2, no biases": Starcoder2Config(**SIZES, head_dim=10, use_bias=False, tie_word_embeddings=False),
    "gpt_neox": GPTNeoXConfig(**MHA_SIZES, rope_parameters=rope(partial_rotary_factor=0.34)),
    "gpt_neox, sequential": GPTNeoXConfig(
        **MHA_SIZES,
        use_parallel_residual=False,
        attention_bias=False,
        hidden_act="gelu_fast",
        tie_word_embeddings=True,
        rope_parameters=rope("linear", factor=3.0, partial_rotary_factor=1.0),
    ),
    "falcon": FalconConfig(**FALCON_SIZES, num_kv_heads=4),
    "falcon, sequential": FalconConfig(**FALCON_SIZES, parallel_attn=False, bias=True, ffn_hidden_size=30),
    "falcon, multi-head": FalconConfig(**FALCON_SIZES, multi_query=False, rope_parameters=rope("dynamic", factor=2.0)),
    "falcon, grouped": FalconConfig(
        **FALCON_SIZES, new_decoder_architecture=True, num_kv_heads=2, bias=True, tie_word_embeddings=False
    ),
    "falcon, grouped, one norm": FalconConfig(
        **FALCON_SIZES, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "opt": OPTConfig(**OPT_SIZES),
    "opt, after": OPTConfig(
        **OPT_SIZES,
        do_layer_norm_before=False,
        enable_bias=False,
        activation_function="gelu",
        tie_word_embeddings=False,
    ),
    "bloom": BloomConfig(**BLOOM_SIZES, n_head=4),
    "bloom, six heads": BloomConfig(**BLOOM_SIZES, n_head=6, tie_word_embeddings=False),
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
