"""Models whose sequences ranks share, and what they read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from transformer import DecoderOnlyTransformer

KINDS: Mapping[str, dict[str, Any]] = {
    "full": {"position": "rotary"},
    "groups": {"position": "rotary", "attention": "gqa", "num_groups": 2},
    "ALiBi": {"position": "alibi"},
    "relative": {"position": "relative"},
    "learned": {"position": "learned", "max_length": 600},
    "sinusoidal": {"position": "sinusoidal"},
    "norm and cap": {"position": "rotary", "qk_norm": True, "softcap": 5.0, "logit_softcap": 20.0},
    "window": {"position": "rotary", "window_size": 24},
    "window and sinks": {"position": "rotary", "window_size": 24, "num_sinks": 4},
    "window of several chunks": {"position": "rotary", "window_size": 150},
    "mixed": {"position": "rotary", "window_size": 24, "layer_pattern": "sliding full"},
    "ALiBi window": {"position": "alibi", "window_size": 24, "num_sinks": 3},
}
VOCABULARY = 60


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> DecoderOnlyTransformer:
    torch.manual_seed(0)
    return DecoderOnlyTransformer(VOCABULARY, 32, 4, 64, 2, **KINDS[kind]).to(dtype).eval()


def ids_of(length: int, batch: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()
