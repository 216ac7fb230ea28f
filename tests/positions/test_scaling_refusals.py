"""Invalid rotary scalings: refused at construction, with the name of the field."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from transformer.errors import ConfigurationError
from transformer.positions import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    RotaryEmbedding,
    RotaryScaling,
    YaRNScaling,
)

NAN, INF = math.nan, math.inf
NOT_FACTORS = (0.0, -1.0, 0.99, NAN, INF, "2", None, True)
NOT_NUMBERS = (0.0, -1.0, NAN, INF, "2", True)
NOT_LENGTHS = (0, -1, 4096.0, "64", None, True)
NOT_LISTS = ([0.0], [1, NAN], [1, -1], ["a"], "ab", 2.0, None)

RULES: list[tuple[Callable[..., RotaryScaling], dict, dict[str, tuple]]] = [
    (LinearScaling, {"factor": 2.0}, {"factor": NOT_FACTORS}),
    (
        DynamicNTKScaling,
        {"factor": 2.0, "original_length": 64, "length": 64},
        {"factor": NOT_FACTORS, "original_length": NOT_LENGTHS, "length": NOT_LENGTHS},
    ),
    (
        YaRNScaling,
        {"factor": 2.0, "original_length": 64},
        {
            "factor": NOT_FACTORS,
            "original_length": NOT_LENGTHS,
            "beta_fast": (*NOT_NUMBERS, None, 0.5),
            "beta_slow": (*NOT_NUMBERS, None),
            "attention_factor": NOT_NUMBERS,
            "mscale": NOT_NUMBERS,
            "mscale_all_dim": NOT_NUMBERS,
            "truncate": (None, "no", 1),
        },
    ),
    (
        Llama3Scaling,
        {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_length": 64},
        {
            "factor": NOT_FACTORS,
            "low_freq_factor": (*NOT_NUMBERS, None, 4, 5.0),
            "high_freq_factor": (*NOT_NUMBERS, None),
            "original_length": NOT_LENGTHS,
        },
    ),
    (
        LongRoPEScaling,
        {"short_factor": [1], "long_factor": [2], "original_length": 8, "length": 16},
        {
            "short_factor": NOT_LISTS,
            "long_factor": NOT_LISTS,
            "original_length": (*NOT_LENGTHS, 1),
            "length": NOT_LENGTHS,
            "factor": NOT_NUMBERS,
            "attention_factor": NOT_NUMBERS,
        },
    ),
]
REFUSED = [
    (name, kind, {**options, name: value})
    for kind, options, wrong in RULES
    for name, values in wrong.items()
    for value in values
]


@pytest.mark.parametrize(("kind", "options", "wrong"), RULES)
def test_the_neighbour_of_what_is_refused_works(kind: Callable[..., RotaryScaling], options: dict, wrong: dict) -> None:
    assert kind(**options).frequencies(10000.0, 4 if kind is not LongRoPEScaling else 2).isfinite().all()


@pytest.mark.parametrize(("name", "kind", "options"), REFUSED, ids=lambda value: str(value)[:90])
def test_refused(name: str, kind: Callable[..., RotaryScaling], options: dict) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name}: expected .*, got "):
        kind(**options)


class Odd(RotaryScaling):
    """A user's own scaling, which gives the values that it is built with."""

    def __init__(self, frequencies: Tensor) -> None:
        self.given = frequencies

    def frequencies(self, base: float, rotary_dim: int) -> Tensor:
        return self.given


@pytest.mark.parametrize(
    ("name", "scaling", "head_dim", "base"),
    [
        ("rotary_dim", DynamicNTKScaling(2.0, 64, 128), 2, 10000.0),
        ("rotary_dim", DynamicNTKScaling(2.0, 64, 64), 2, 10000.0),
        ("base", YaRNScaling(2.0, 64), 8, 1.0),
        ("base", YaRNScaling(2.0, 64), 8, 0.5),
        # All pairs slower than beta_slow, and all faster than beta_fast: the ramp would run backwards.
        ("original_length", YaRNScaling(2.0, 2, beta_slow=4.0), 32, 10.0),
        ("original_length", YaRNScaling(2.0, 10**9), 8, 2.0),
        ("short_factor", LongRoPEScaling([1.0] * 3, [1.0] * 4, 64, 64), 8, 10000.0),
        ("long_factor", LongRoPEScaling([1.0] * 4, [1.0] * 5, 64, 64), 8, 10000.0),
        ("scaling", DynamicNTKScaling(1e300, 1, 10**9), 8, 10000.0),
        ("scaling", Odd(torch.ones(4)), 8, 10000.0),
        ("scaling", Odd(torch.ones(3, dtype=torch.float64)), 8, 10000.0),
        ("scaling", Odd(torch.ones(4, dtype=torch.float64, device="meta")), 8, 10000.0),
        ("scaling", Odd(torch.tensor([1, 0, 1, 1], dtype=torch.float64)), 8, 10000.0),
        ("scaling", Odd(torch.tensor([1, NAN, 1, 1], dtype=torch.float64)), 8, 10000.0),
        ("scaling", {"rope_type": "linear", "factor": 2.0}, 8, 10000.0),
        ("scaling", LinearScaling, 8, 10000.0),
    ],
)
def test_refused_by_the_embedding(name: str, scaling: object, head_dim: int, base: float) -> None:
    """Values without frequencies are refused at construction, instead of NaN later."""
    with pytest.raises(ConfigurationError, match=f"^{name}: expected .*, got "):
        RotaryEmbedding(head_dim, base, scaling=scaling)


def test_a_rule_of_a_users_own() -> None:
    given = torch.tensor([0.5, 0.25], dtype=torch.float64)
    table = RotaryEmbedding(4, scaling=Odd(given)).table(range(2, 3))
    assert table.cos[0].tolist() == pytest.approx([math.cos(1), math.cos(0.5)] * 2, abs=1e-7)
