"""Public calls of the library that take tensors, with valid arguments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.integration.models import Custom
from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from tests.oracle import Options
from tests.setups import build, padding, tokens
from transformer.generation import generate, stream
from transformer.models import EncoderTransformer, mean_pooled

X, SOURCE, REAL = tokens(2, 4, 16), tokens(2, 5, 16, seed=1), padding([(0, 4), (1, 3)], 4)
PROMPT, SOURCE_IDS = ids(2, 4), ids(2, 5, VOCAB + 2)
SOURCE_REAL = padding([(0, 5), (0, 3)], 5)


def module(cached: bool = False, causal: bool = False, kind: str = "GQA") -> nn.Module:
    groups = {"MHA": 4, "GQA": 2, "MQA": 1}[kind]
    return build(Options(num_groups=groups, causal=causal, cached=cached), kind).eval()


LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], Callable[..., object]]] = {
    "self-attention": (
        lambda: module(True, causal=True),
        {"x": X, "attention_mask": REAL},
        lambda m, x, attention_mask: m(x, attention_mask=attention_mask),
    ),
    "plan": (
        lambda: module(True, causal=True),
        {"x": X, "attention_mask": REAL},
        lambda m, x, attention_mask: m.plan(x, None, attention_mask),
    ),
    "bias": (
        module,
        {"x": X, "attn_bias": torch.zeros(1, 4)},
        lambda m, x, attn_bias: m(x, attn_bias=attn_bias),
    ),
    "bias of a source": (
        module,
        {"x": X, "kv": SOURCE, "attn_bias": torch.zeros(1, 5)},
        lambda m, x, kv, attn_bias: m(x, kv, attn_bias=attn_bias),
    ),
    "cross-attention": (
        lambda: module(True),
        {"x": X, "kv": SOURCE, "attention_mask": REAL, "kv_mask": SOURCE_REAL},
        lambda m, x, kv, attention_mask, kv_mask: m(x, kv, attention_mask=attention_mask, kv_mask=kv_mask),
    ),
    "block": (
        lambda: decoder_only().enable_cache().decoder.blocks[0],
        {"x": X, "attention_mask": REAL},
        lambda m, x, attention_mask: m(x, attention_mask=attention_mask),
    ),
    "stack": (
        lambda: decoder_only().enable_cache().decoder,
        {"x": X, "attention_mask": REAL},
        lambda m, x, attention_mask: m(x, attention_mask=attention_mask),
    ),
    "stack over a source": (
        lambda: encoder_decoder().enable_cache().decoder,
        {"x": X, "source": SOURCE, "attention_mask": REAL, "source_mask": SOURCE_REAL},
        lambda m, x, source, attention_mask, source_mask: m(
            x, source, attention_mask=attention_mask, source_mask=source_mask
        ),
    ),
}

MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], Callable[..., object]]] = {
    "model": (
        lambda: decoder_only().enable_cache(),
        {"input_ids": PROMPT, "attention_mask": REAL},
        lambda m, input_ids, attention_mask: m(input_ids, attention_mask),
    ),
    "generate": (
        lambda: decoder_only().enable_cache(),
        {"input_ids": PROMPT, "attention_mask": REAL},
        lambda m, input_ids, attention_mask: m.generate(input_ids, attention_mask, max_new_tokens=2),
    ),
    "stream": (
        lambda: decoder_only().enable_cache(),
        {"input_ids": PROMPT, "attention_mask": REAL},
        lambda m, input_ids, attention_mask: next(m.stream(input_ids, attention_mask, max_new_tokens=2)),
    ),
    "generation.generate": (
        Custom,
        {"input_ids": PROMPT, "attention_mask": REAL},
        lambda m, input_ids, attention_mask: generate(m, input_ids, attention_mask, max_new_tokens=2),
    ),
    "generation.stream": (
        Custom,
        {"input_ids": PROMPT, "attention_mask": REAL},
        lambda m, input_ids, attention_mask: next(stream(m, input_ids, attention_mask, max_new_tokens=2)),
    ),
    "encoder with types": (
        lambda: EncoderTransformer(VOCAB, 16, 4, 20, 2, num_token_types=2).eval(),
        {"input_ids": PROMPT, "token_type_ids": PROMPT % 2},
        lambda m, input_ids, token_type_ids: m(input_ids, token_type_ids=token_type_ids),
    ),
    "encoder": (
        lambda: EncoderTransformer(VOCAB, 16, 4, 20, 2).eval(),
        {"input_ids": PROMPT, "attention_mask": REAL},
        lambda m, input_ids, attention_mask: m(input_ids, attention_mask),
    ),
    "encoder-decoder": (
        lambda: encoder_decoder().enable_cache(),
        {"source_ids": SOURCE_IDS, "target_ids": PROMPT, "source_mask": SOURCE_REAL, "target_mask": REAL},
        lambda m, source_ids, target_ids, source_mask, target_mask: m(source_ids, target_ids, source_mask, target_mask),
    ),
    "encoder-decoder, generate": (
        lambda: encoder_decoder().enable_cache(),
        {"source_ids": SOURCE_IDS, "source_mask": SOURCE_REAL},
        lambda m, source_ids, source_mask: m.generate(source_ids, source_mask, max_new_tokens=2),
    ),
    "encoder-decoder, stream": (
        lambda: encoder_decoder().enable_cache(),
        {"source_ids": SOURCE_IDS, "source_mask": SOURCE_REAL},
        lambda m, source_ids, source_mask: next(m.stream(source_ids, source_mask, max_new_tokens=2)),
    ),
    "mean_pooled": (
        nn.Identity,
        {"states": X, "attention_mask": REAL},
        lambda _, states, attention_mask: mean_pooled(states, attention_mask),
    ),
}

DOORS = {**LAYERS, **MODELS}
PLACES = [(name, argument) for name, (_, given, _) in DOORS.items() for argument in given]
