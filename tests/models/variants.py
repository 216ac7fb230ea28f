"""Whole models for tests: one of each kind of option, with random numbers from a seed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.conversations import cache_snapshot
from tests.setups import fill
from transformer.cache import holders
from transformer.models import DecoderOnlyTransformer, EncoderDecoderTransformer

VOCAB = 11
SHAPE = {"d_model": 16, "num_heads": 4, "d_ff": 20, "num_layers": 2}

VARIANTS: dict[str, dict[str, object]] = {
    "mha rotary": {"tied_embeddings": False},
    "mqa alibi, window and sinks": {
        "attention": "mqa",
        "position": "alibi",
        "window_size": 3,
        "num_sinks": 1,
        "tied_embeddings": False,
    },
    "gqa relative, pattern": {
        "attention": "gqa",
        "num_groups": 2,
        "position": "relative",
        "window_size": 2,
        "layer_pattern": "sliding full",
        "tied_embeddings": False,
    },
    "mha learned, after": {
        "position": "learned",
        "max_length": 24,
        "position_offset": 2,
        "norm": "layer",
        "norm_placement": "after",
        "feed_forward": "plain",
        "activation": "gelu",
        "attention_bias": True,
    },
    "gqa rotary, window, both": {
        "attention": "gqa",
        "num_groups": 2,
        "window_size": 4,
        "norm_placement": "both",
        "qk_norm": True,
        "logit_softcap": 5.0,
        "embedding_scale": 4.0,
    },
    "mqa sinusoidal": {"attention": "mqa", "position": "sinusoidal", "logit_scale": 0.5, "embedding_norm": True},
    "mha relative per layer": {"position": "relative", "relative_per_layer": True, "tied_embeddings": False},
    "mha none": {"position": "none", "tied_embeddings": False, "head_dim": 6},
}


def decoder_only(variant: str = "mha rotary", dtype: torch.dtype = torch.float64, **more) -> DecoderOnlyTransformer:
    """The same variant and options give the same weights."""
    model = DecoderOnlyTransformer(VOCAB, **{**SHAPE, **VARIANTS[variant], **more})
    fill(model, 0)
    return model.to(dtype).eval()


def encoder_decoder(
    variant: str = "mha rotary", dtype: torch.dtype = torch.float64, **more
) -> EncoderDecoderTransformer:
    """Sources have a vocabulary of their own, of two tokens more."""
    model = EncoderDecoderTransformer(VOCAB + 2, VOCAB, **SHAPE, **{**VARIANTS[variant], **more})
    fill(model, 0)
    return model.to(dtype).eval()


def ids(batch: int, length: int, vocab_size: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def kept(model: nn.Module) -> list[object]:
    """The content of all caches of a model's layers, as bytes: equal if nothing changed."""
    return [cache_snapshot(holder) for holder in holders(model).values()]
