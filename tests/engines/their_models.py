"""Sizes of small models of transformers, and the name of the cache in their forwards."""

from typing import Any

from transformer.engines.modeling import CACHE

__all__ = ["CACHE", "SIZES"]

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
