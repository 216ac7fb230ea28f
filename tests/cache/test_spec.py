"""Specification of a cache: its fields, what continues what, and how many slots and bytes it gets."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from transformer import GroupQueryAttention, KVCache, LayerCache
from transformer.cache import CacheSpec, LayerPlan
from transformer.cache.spec import LARGEST_OPTION, SLACK
from transformer.errors import ArgumentError
from transformer.positions import RotaryEmbedding

SPEC = CacheSpec(2, 4, num_sinks=1, window_size=5, max_length=9, position="RotaryEmbedding(4)")
FIELDS = {
    "num_kv_heads": 2,
    "head_dim": 4,
    "num_sinks": 1,
    "window_size": 5,
    "max_length": 9,
    "position": "RotaryEmbedding(4)",
}


def test_the_same_fields_everywhere() -> None:
    """The constructor's keywords, the specification, the plan of a layer, and what a file describes."""
    assert SPEC.fields() == FIELDS
    assert LayerCache(**FIELDS).spec == CacheSpec.from_fields(FIELDS) == SPEC
    assert LayerPlan(**FIELDS, dtype=torch.float16).fields() == {
        **FIELDS,
        "dtype": torch.float16,
        "kind": "self",
        "budget": None,
    }
    cache = LayerCache.of(SPEC)
    for name, value in FIELDS.items():
        assert getattr(cache, name) == value
    assert {cache.spec: 1}[SPEC] == 1
    with pytest.raises(FrozenInstanceError):
        SPEC.head_dim = 8  # type: ignore[misc]


def test_a_modules_cache_has_the_modules_specification() -> None:
    scheme = RotaryEmbedding(4)
    module = GroupQueryAttention(16, 4, 2, True, True, window_size=5, num_sinks=1, max_cache_length=9, position=scheme)
    assert module.cache_spec == replace(SPEC, position=repr(scheme))
    module(torch.zeros(1, 3, 16))
    assert module.kv_cache.spec == module.new_cache().spec == module.cache_spec


def test_the_old_name_still_answers() -> None:
    with pytest.warns(DeprecationWarning, match="spec"):
        assert LayerCache.of(SPEC).options == FIELDS


def test_differences_leave_out_the_maximum() -> None:
    assert SPEC.differences(replace(SPEC, max_length=None)) == {}
    assert SPEC.differences(replace(SPEC, window_size=6, head_dim=8)) == {"head_dim": (4, 8), "window_size": (5, 6)}
    cache = KVCache(num_layers=1, num_kv_heads=2, head_dim=4, max_length=9)
    assert LayerCache.of(replace(SPEC, num_sinks=0, window_size=None, position=None)).spec == cache.layers["0"].spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 0}, "another num_kv_heads than 0"),
        ({"num_kv_heads": True}, "another num_kv_heads than True"),
        ({"head_dim": LARGEST_OPTION + 1}, "another head_dim"),
        ({"num_sinks": -1}, "another num_sinks than -1"),
        ({"num_sinks": False}, "another num_sinks than False"),
        ({"window_size": 0}, "another window_size than 0"),
        ({"max_length": 2.0}, "another max_length than 2.0"),
        ({"position": 3}, "another position than 3"),
        ({"window_size": None}, "no num_sinks without a window_size, got 1"),
        ({"max_length": 5}, "a max_length of at least 6, got 5"),
        ({"more": 1}, "expected .*'window_size'.*, got .*more"),
    ],
)
def test_fields_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheSpec.from_fields({**FIELDS, **changes})


def test_capacity() -> None:
    free, window, fixed = CacheSpec(2, 4), CacheSpec(2, 4, window_size=5), CacheSpec(2, 4, max_length=9)
    assert free.room(10, 0, None) == 10 + SLACK
    assert free.room(101, 100, None) == 200
    assert free.room(10, 0, None, reserved=500) == 500
    assert window.room(5, 0, 5) == window.room(7, 100, 5) == 2 * 5 + SLACK
    assert fixed.room(1, 0, None) == fixed.room(1, 0, None, reserved=500) == 9
    assert SPEC.room(1, 0, 5) == 2 * 5 + SLACK
    with pytest.raises(ArgumentError, match="length: expected at most 9"):
        fixed.most_room(10)


def test_bytes() -> None:
    """As the planner counts them, to the byte what a cache allocates."""
    assert SPEC.nbytes(3, 10, torch.float16) == 2 * 3 * 2 * 10 * 4 * 2
    cache = LayerCache.of(SPEC)
    cache.allocate(3, 5, torch.float16)
    assert cache.nbytes < SPEC.most_bytes(3, 5, torch.float16) == SPEC.nbytes(3, 2 * 5 + SLACK + 1, torch.float16)
    assert SPEC.most_bytes(3, 0, torch.float16) == 0


def test_a_share_is_a_field_where_ranks_share_the_heads() -> None:
    shared = replace(SPEC, share=(1, 4))
    assert shared.fields() == {**FIELDS, "share": (1, 4)}
    # As a file gives it.
    assert CacheSpec.from_fields({**FIELDS, "share": [1, 4]}) == shared == LayerCache.of(shared).spec
    assert shared.differences(SPEC) == {"share": ((1, 4), None)}
    for wrong in ([4, 4], [-1, 2], [0, 0], [0], [True, 2], "0 of 2", None):
        with pytest.raises(ValueError, match="share"):
            CacheSpec.from_fields({**FIELDS, "share": wrong})
    module = GroupQueryAttention(16, 4, 2, True, True)
    with pytest.raises(ArgumentError, match=r"share \(rank, ranks\) = None, got those of \(0, 2\)"):
        module.kv_cache = LayerCache.of(replace(module.cache_spec, share=(0, 2)))
