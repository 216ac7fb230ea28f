"""Number of key/value heads of `GroupQueryAttention`: one option with two names."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from transformer import GroupQueryAttention, MultiHeadAttention, MultiQueryAttention
from transformer.attention import to_gqa
from transformer.errors import ConfigurationError


@torch.no_grad()
def test_both_names_give_one_module() -> None:
    module = GroupQueryAttention(16, 4, 2, True, True)
    other = GroupQueryAttention(16, 4, num_kv_heads=2, apply_causal_mask=True, use_kv_cache=True)
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 16)
    assert torch.equal(other(x), module(x))
    assert repr(other) == repr(module)


@pytest.mark.parametrize(
    ("module", "number"),
    [
        (MultiHeadAttention(16, 4), 4),
        (MultiQueryAttention(16, 4), 1),
        (GroupQueryAttention(16, 4, 2), 2),
        (GroupQueryAttention(16, 4, num_kv_heads=2), 2),
        (to_gqa(MultiHeadAttention(16, 4), num_kv_heads=2), 2),
        (copy.deepcopy(GroupQueryAttention(16, 4, num_kv_heads=2)), 2),
    ],
)
def test_a_module_answers_to_both_names(module: MultiHeadAttention, number: int) -> None:
    assert (module.num_groups, module.num_kv_heads) == (number, number)


GIVEN: list[Callable[..., object]] = [
    lambda **options: GroupQueryAttention(16, 4, **options),
    lambda **options: to_gqa(MultiHeadAttention(16, 4), **options),
]


@pytest.mark.parametrize("make", GIVEN, ids=["module", "to_gqa"])
@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({}, "got None; give it by this name or as num_kv_heads"),
        ({"num_groups": None, "num_kv_heads": None}, "got None; give it by this name or as num_kv_heads"),
        ({"num_groups": 2, "num_kv_heads": 2}, "exactly one of the two, .* got num_groups=2 and num_kv_heads=2"),
        ({"num_groups": 2, "num_kv_heads": 1}, "exactly one of the two, .* got num_groups=2 and num_kv_heads=1"),
    ],
)
def test_exactly_one_of_the_names(make: Callable[..., object], options: dict[str, object], got: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^num_groups(, num_kv_heads)?: expected .*{got}"):
        make(**options)


@pytest.mark.parametrize("make", GIVEN, ids=["module", "to_gqa"])
@pytest.mark.parametrize("number", [0, 3, 2.0, "2", True], ids=repr)
def test_a_number_is_refused_under_either_name(make: Callable[..., object], number: object) -> None:
    for name in ("num_groups", "num_kv_heads"):
        with pytest.raises(ConfigurationError, match=rf"(num_groups|{name}): expected"):
            make(**{name: number})
