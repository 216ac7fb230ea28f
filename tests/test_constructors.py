"""Constructors: any value of an option works or is refused by a typed error with the option."""

from __future__ import annotations

import dataclasses
import inspect
import math

import numpy as np
import pytest
import torch

from transformer import DecoderOnlyTransformer, GroupQueryAttention, KVCache, MultiHeadAttention, MultiQueryAttention
from transformer.blocks import FeedForward, GatedFeedForward, LayerNorm, MixtureOfExperts, RMSNorm
from transformer.cache import cache_bytes
from transformer.errors import AttentionError, ConfigurationError
from transformer.models import ClassifierConfig, DecoderOnlyConfig, EncoderConfig, EncoderDecoderConfig
from transformer.positions import (
    ALiBi,
    LearnedPositions,
    LinearScaling,
    RelativePositionBias,
    RotaryEmbedding,
    SinusoidalPositions,
    YaRNScaling,
)

MODEL = {"d_model": 8, "num_heads": 2, "d_ff": 8, "num_layers": 1}
CONSTRUCTORS = {
    MultiHeadAttention: {"embed_dim": 8, "num_heads": 4},
    MultiQueryAttention: {"embed_dim": 8, "num_heads": 4},
    GroupQueryAttention: {"embed_dim": 8, "num_heads": 4, "num_groups": 2},
    RotaryEmbedding: {"head_dim": 4},
    ALiBi: {"num_heads": 4},
    RelativePositionBias: {"num_heads": 4},
    LearnedPositions: {"max_length": 4, "embed_dim": 8},
    SinusoidalPositions: {"embed_dim": 8},
    LinearScaling: {"factor": 2.0},
    YaRNScaling: {"factor": 2.0, "original_length": 64},
    RMSNorm: {"dim": 8},
    LayerNorm: {"dim": 8},
    FeedForward: {"embed_dim": 8, "hidden_dim": 8},
    GatedFeedForward: {"embed_dim": 8, "hidden_dim": 8},
    MixtureOfExperts: {"embed_dim": 8, "hidden_dim": 8, "num_experts": 4, "experts_per_token": 2},
    KVCache: {"num_layers": 1, "num_kv_heads": 2, "head_dim": 4},
    DecoderOnlyConfig: {"vocab_size": 9, **MODEL},
    EncoderConfig: {"vocab_size": 9, **MODEL},
    ClassifierConfig: {"vocab_size": 9, **MODEL},
    EncoderDecoderConfig: {"src_vocab_size": 9, "tgt_vocab_size": 9, **MODEL},
}
# PyTorch's own words for what is no dtype or device, and modules that are called to make a norm or an activation.
THEIRS = {"device", "dtype", "qk_norm"}
HUGE = (10**5000, -(10**5000), [10**5000])
"""Numbers with more digits than Python prints."""
ODD = (None, 0, -1, 10**30, 10**400, math.nan, math.inf, -math.inf, 1e308, 1e-320, 0.5, "x", b"1", [1], (1,), {}, 1j)
NUMBERS_OF_OTHERS = (True, np.int64(3), np.float32(0.5), np.array([1]), torch.tensor(2))


def options(constructor: type) -> list[str]:
    if dataclasses.is_dataclass(constructor):
        return [field.name for field in dataclasses.fields(constructor) if field.init]
    return [name for name in inspect.signature(constructor).parameters if name not in ("args", "options")]


@pytest.mark.parametrize("constructor", CONSTRUCTORS, ids=lambda constructor: constructor.__name__)
def test_odd_values_work_or_are_refused_by_name(constructor: type) -> None:
    given = CONSTRUCTORS[constructor]
    for option in set(options(constructor)) - THEIRS:
        for value in (*ODD, *HUGE, *NUMBERS_OF_OTHERS):
            error = raised(constructor, {**given, option: value})
            assert error is None or (isinstance(error, AttentionError) and option in str(error)), (
                option,
                type(value),
                error,
            )


def raised(constructor: type, given: dict[str, object]) -> Exception | None:
    try:
        with torch.device("meta"):
            constructor(**given)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("value", [*HUGE[:2], -1, 1.0, True, np.int64(1), None, [1]], ids=lambda v: type(v).__name__)
def test_numbers_of_calls_are_refused_by_name(value: object) -> None:
    model = DecoderOnlyTransformer(9, **MODEL).eval().enable_cache()
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    cache = model.kv_cache
    for name, call in {
        "length": lambda: cache.truncate(value),
        "rows": lambda: cache.select([value]),
        "tokens": lambda: cache.reserve(value),
        "batch": lambda: cache_bytes(model, value, 4),
        "max_length": lambda: DecoderOnlyTransformer(9, **MODEL).enable_cache(max_length=value),
        "layers": lambda: DecoderOnlyTransformer(9, **MODEL).enable_cache(layers=[value]),
        "logits_to_keep": lambda: model(torch.tensor([[1]]), logits_to_keep=value),
        "max_new_tokens": lambda: model.generate(torch.tensor([[1]]), max_new_tokens=value),
    }.items():
        if (name == "max_length" and value is None) or (type(value) is int and value > 0 and name in UNBOUNDED):
            continue
        if name in ("length", "max_new_tokens") and isinstance(value, list):
            continue  # one number for each row
        with pytest.raises(AttentionError, match=rf"^{name}\b.*: expected"):
            call()
    assert cache.length == 3


UNBOUNDED = ("batch", "logits_to_keep", "max_new_tokens")


@pytest.mark.parametrize("constructor", [MultiHeadAttention, MultiQueryAttention])
def test_a_number_of_groups_is_no_causal_order(constructor: type) -> None:
    """The habit of `GroupQueryAttention(8, 4, 2)`, which would make attention causal in silence."""
    with pytest.raises(ConfigurationError, match="apply_causal_mask: expected True or False, got 2"):
        constructor(8, 4, 2)
