"""Invalid options: refused at construction, with the option and its value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from transformer import GroupQueryAttention, MultiHeadAttention, MultiQueryAttention
from transformer.errors import ConfigurationError
from transformer.positions import ALiBi, RelativePositionBias, RotaryEmbedding

NAN, INF = math.nan, math.inf
WRONG_COUNTS = (0, -1, 2.0, "4", True)

REFUSED: list[tuple[str, dict]] = [
    *(("embed_dim", {"embed_dim": value}) for value in WRONG_COUNTS),
    *(("num_heads", {"num_heads": value}) for value in WRONG_COUNTS),
    *(("num_groups", {"num_groups": value}) for value in WRONG_COUNTS),
    *(("head_dim", {"head_dim": value}) for value in WRONG_COUNTS),
    *(("kv_dim", {"kv_dim": value}) for value in WRONG_COUNTS),
    *(("window_size", {"window_size": value}) for value in WRONG_COUNTS),
    *(("max_cache_length", {"max_cache_length": value}) for value in WRONG_COUNTS),
    *(("num_sinks", {"window_size": 4, "num_sinks": value}) for value in (-1, 1.0, "1", True)),
    ("embed_dim", {"embed_dim": 18}),
    ("embed_dim", {"embed_dim": 3}),
    ("num_groups", {"num_groups": 3}),
    ("num_groups", {"num_groups": 8}),
    ("num_sinks", {"num_sinks": 2}),
    ("max_cache_length", {"window_size": 4, "max_cache_length": 3}),
    ("max_cache_length", {"window_size": 4, "num_sinks": 2, "max_cache_length": 5}),
    *(("scale", {"scale": value}) for value in (NAN, INF, -INF, 0.0, -0.0, -1.0, 1e-320, 1e39)),
    *(("softcap", {"softcap": value}) for value in (NAN, INF, 0.0, -1.0)),
    *(("dropout", {"dropout": value}) for value in (NAN, INF, -0.1, 1.0, 1.5)),
    ("position", {"position": RotaryEmbedding(8)}),
    ("position", {"position": ALiBi(3)}),
    ("position", {"position": RelativePositionBias(8)}),
    *(("position", {"position": value}) for value in ("rotary", nn.Linear(4, 4), RotaryEmbedding, 1)),
]


@pytest.mark.parametrize(("name", "options"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused(name: str, options: dict) -> None:
    """embed_dim not divisible, num_heads % num_groups, window_size < 1, num_sinks < 0, NaN scale, and the like."""
    arguments = {"embed_dim": 16, "num_heads": 4, "num_groups": 2, **options}
    with pytest.raises(ConfigurationError, match=f"^{name}: expected") as refusal:
        GroupQueryAttention(**arguments)
    assert isinstance(refusal.value, ValueError)
    assert "got " in str(refusal.value)
    arguments.pop("num_groups")
    if "num_groups" not in options:
        for kind in (MultiHeadAttention, MultiQueryAttention):
            with pytest.raises(ConfigurationError, match=f"^{name}: expected"):
                kind(**arguments)


ACCEPTED: list[dict] = [
    {},
    {"num_groups": 4},
    {"num_groups": 1},
    {"embed_dim": 18, "head_dim": 5},
    {"head_dim": 1},
    {"kv_dim": 1},
    {"window_size": 1},
    {"window_size": 1, "num_sinks": 3},
    {"window_size": 4, "num_sinks": 2, "max_cache_length": 6},
    {"max_cache_length": 1},
    {"scale": 1e-45},
    {"scale": 1e38},
    {"softcap": 1e-3},
    {"dropout": 0.0},
    {"dropout": 0.999},
    {"bias": False},
    {"bias": False, "out_bias": True},
    {"position": RotaryEmbedding(4)},
    {"position": ALiBi(4)},
]


@pytest.mark.parametrize("options", ACCEPTED, ids=str)
def test_the_neighbours_of_what_is_refused_work(options: dict) -> None:
    arguments = {"embed_dim": 16, "num_heads": 4, "num_groups": 2, "use_kv_cache": True, **options}
    module = GroupQueryAttention(**arguments)
    width = arguments["embed_dim"]
    with torch.no_grad():
        for length in (1, 0):
            x = torch.ones(2, length, width)
            source = torch.ones(2, 3, options["kv_dim"]) if "kv_dim" in options else None
            if source is None or length:
                assert module(x, source).isfinite().all()
