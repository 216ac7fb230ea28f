"""Slopes and bias of ALiBi, compared with the paper."""

from __future__ import annotations

import math

import pytest
import torch

from tests.oracle_positions import Slopes
from tests.setups import tokens
from transformer.errors import ConfigurationError
from transformer.positions import ALiBi


def published_slopes(heads: int) -> list[float]:
    """`get_slopes` as the authors published it."""

    def power_of_two(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return power_of_two(heads)
    closest = 2 ** math.floor(math.log2(heads))
    return power_of_two(closest) + published_slopes(2 * closest)[0::2][: heads - closest]


@pytest.mark.parametrize("heads", [*range(1, 20), 24, 32, 33, 48, 71, 112, 128])
def test_slopes(heads: int) -> None:
    bias = ALiBi(heads).bias(torch.tensor([[1]]))
    assert bias.shape == (heads, 1, 1)
    mine = (-bias.double()).flatten().tolist()
    assert mine == pytest.approx(published_slopes(heads), rel=1e-6)
    assert mine == pytest.approx([Slopes().slope(head, heads) for head in range(heads)], rel=1e-6)


def test_the_slopes_of_eight_heads() -> None:
    slopes = -ALiBi(8).bias(torch.tensor([[1]])).flatten()
    assert slopes.tolist() == [2.0**-i for i in range(1, 9)]


def test_bias_grows_with_the_distance_to_either_side() -> None:
    distances = torch.tensor([[3, 0, -2], [4_000_000, 1, 7]])
    bias = ALiBi(6).bias(distances)
    assert bias.shape == (6, 2, 3)
    for head in range(6):
        for i, j in ((i, j) for i in range(2) for j in range(3)):
            wanted = -Slopes().slope(head, 6) * abs(distances[i, j].item())
            assert bias[head, i, j].item() == pytest.approx(wanted, rel=1e-6)


def test_rows_have_their_own_distances() -> None:
    alibi, distances = ALiBi(3), (10 * tokens(4, 2, 5)).long()
    bias = alibi.bias(distances)
    assert bias.shape == (4, 3, 2, 5)
    for row, own in zip(bias, distances, strict=True):
        assert torch.equal(row, alibi.bias(own))


def test_slopes_survive_sixteen_bits() -> None:
    """A slope of 2 ** -0.5 does not fit bfloat16; moving the module must not round it for good."""
    alibi, far = ALiBi(16), torch.tensor([[1, 1000]])
    assert torch.equal(ALiBi(16).to(torch.bfloat16).float().bias(far), alibi.bias(far))


@pytest.mark.parametrize("heads", [0, -1])
def test_refused(heads: int) -> None:
    with pytest.raises(ConfigurationError):
        ALiBi(heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bias_of_some_heads_is_theirs_of_all(dtype: torch.dtype) -> None:
    alibi, distance = ALiBi(6), torch.arange(-3, 9).view(3, 4)
    for heads in (range(3), range(2, 5), range(6)):
        part = alibi.of_heads(heads)
        assert part.num_heads == len(heads)
        expected = alibi.bias_for(distance, dtype)[heads.start : heads.stop]
        assert torch.equal(part.bias_for(distance, dtype), expected)
        assert torch.equal(part.slopes, alibi.slopes[heads.start : heads.stop])
    assert repr(alibi.of_heads(range(2, 5))) == "ALiBi(num_heads=3, heads=range(2, 5))"
