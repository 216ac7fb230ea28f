"""Relative bias of T5: its buckets in integer arithmetic, and the lookup in its table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.internals import constants
from tests.oracle_positions import Buckets
from tests.setups import tokens
from transformer.errors import ConfigurationError
from transformer.positions import RelativePositionBias


def telling(num_buckets: int, **keywords: object) -> RelativePositionBias:
    """One head, whose bias for a bucket is the bucket's number."""
    relative = RelativePositionBias(1, num_buckets=num_buckets, **keywords)
    with torch.no_grad():
        relative.embedding.weight.copy_(torch.arange(num_buckets)[:, None])
    return relative


def buckets(relative: RelativePositionBias, distances: list[int]) -> list[int]:
    return relative.bias(torch.tensor([distances]))[0, 0].int().tolist()


@settings(max_examples=60)
@given(
    st.sampled_from((4, 8, 16, 32, 64)),
    st.sampled_from((40, 64, 128, 1000)),
    st.booleans(),
    st.lists(st.integers(-5000, 5000), min_size=1, max_size=20),
)
def test_buckets(num_buckets: int, max_distance: int, bidirectional: bool, distances: list[int]) -> None:
    relative = telling(num_buckets, max_distance=max_distance, bidirectional=bidirectional)
    rule = Buckets(num_buckets, max_distance, bidirectional)
    assert buckets(relative, distances) == [rule.bucket(distance) for distance in distances]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("count", "longest"), [(32, 128), (8, 20), (64, 256)])
def test_every_edge(count: int, longest: int, bidirectional: bool) -> None:
    """All distances beyond the longest: edges between buckets are those of integer arithmetic."""
    relative = telling(count, max_distance=longest, bidirectional=bidirectional)
    distances = [*range(-2 * longest, 2 * longest), -(10**6), 10**6]
    rule = Buckets(count, longest, bidirectional)
    assert buckets(relative, distances) == [rule.bucket(distance) for distance in distances]


def test_the_default_buckets_of_t5() -> None:
    """Values that the published T5 code gives for 32 buckets and a longest distance of 128."""
    distances = [-200, -128, -8, -1, 0, 1, 7, 8, 11, 12, 16, 20, 32, 64, 127, 128, 200]
    causal = telling(32, max_distance=128)
    assert buckets(causal, distances) == [
        *(0, 0, 0, 0, 0, 1, 7, 8, 11, 12, 16, 17, 21, 26, 31, 31, 31),
    ]
    both = telling(32, max_distance=128, bidirectional=True)
    assert buckets(both, distances) == [
        *(31, 31, 24, 17, 0, 1, 7, 8, 8, 9, 10, 10, 12, 14, 15, 15, 15),
    ]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_long_distance_takes_no_more_memory_than_its_buckets(bidirectional: bool) -> None:
    """Here a table of all distances would take four GiB."""
    relative = telling(32, max_distance=2**28, bidirectional=bidirectional)
    assert 0 < sum(copy.numel() for copies in constants(relative) for copy in copies) < 100
    rule = Buckets(32, 2**28, bidirectional)
    distances = [0, 1, 7, 15, 16, 17, 1000, 2**20 + 1, 2**27, 2**28 - 64, 2**28, 2**40, -1, -(2**20), -(2**40)]
    assert buckets(relative, distances) == [rule.bucket(distance) for distance in distances]


def test_one_column_of_the_table_for_each_head() -> None:
    relative = RelativePositionBias(3, num_buckets=8, max_distance=20)
    assert relative.embedding.weight.shape == (8, 3)
    distances = torch.tensor([[2, 1, 0, -1], [30, 2, 1, 0]])
    bias = relative.bias(distances)
    assert bias.shape == (3, 2, 4)
    for i, j in ((i, j) for i in range(2) for j in range(4)):
        row = Buckets(8, 20).bucket(int(distances[i, j]))
        assert torch.equal(bias[:, i, j], relative.embedding.weight[row])


def test_rows_have_their_own_distances() -> None:
    relative = RelativePositionBias(2, num_buckets=8, max_distance=20, bidirectional=True)
    distances = (10 * tokens(4, 2, 5)).long()
    bias = relative.bias(distances)
    assert bias.shape == (4, 2, 2, 5)
    for row, own in zip(bias, distances, strict=True):
        assert torch.equal(row, relative.bias(own))


def test_the_table_learns() -> None:
    relative = RelativePositionBias(2, num_buckets=4, max_distance=10)
    relative.bias(torch.tensor([[0, 1, 1, 50]])).sum().backward()
    gradient: Tensor | None = relative.embedding.weight.grad
    assert gradient is not None
    assert gradient.tolist() == [[1.0] * 2, [2.0] * 2, [0.0] * 2, [1.0] * 2]


@pytest.mark.parametrize(
    ("heads", "keywords"),
    [
        (0, {}),
        (-2, {}),
        (2, {"num_buckets": 0}),
        (2, {"num_buckets": -4}),
        (2, {"num_buckets": 7, "bidirectional": True}),
        (2, {"num_buckets": 32, "max_distance": 0}),
        (2, {"num_buckets": 32, "max_distance": -5}),
        (2, {"num_buckets": 32, "max_distance": 16}),
    ],
)
def test_refused(heads: int, keywords: dict) -> None:
    with pytest.raises(ConfigurationError):
        RelativePositionBias(heads, **keywords)
