"""Policies, each against plain loops over one row and one head at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.conversations import assert_same
from tests.oracle import dot, softmax
from tests.setups import tokens
from transformer.cache import AccumulatedAttention, KeyNorm, LastQueries, Needs, Policy, Random, SinksAndNewest
from transformer.errors import ConfigurationError

B, H, G, S, D = 2, 4, 2, 7, 3
POSITIONS = torch.tensor(
    [[[0, 1, 2, 4, 6, 8, 9], [1, 3, 4, 5, 7, 8, 9]], [[0, 1, 2, 3, 4, -1, -1], [0, 2, 3, 4, 5, -1, -1]]]
)
REAL = POSITIONS >= 0
KEYS, VALUES = tokens(B, G, S, D, seed=1), tokens(B, G, S, D, seed=2)


def scores(by: Policy, **given: Tensor) -> Tensor:
    """Those of the tokens that there are, 0 elsewhere."""
    result = by(KEYS, VALUES, positions=POSITIONS, **given)
    assert result.shape == (B, G, S)
    assert not bool(result[REAL].isnan().any())
    return result.masked_fill(~REAL, 0.0)


def test_small_norms_of_keys_are_kept() -> None:
    found = scores(KeyNorm())
    for b in range(B):
        for g in range(G):
            norms = {-sum(x * x for x in KEYS[b, g, s].tolist()): s for s in range(S) if REAL[b, g, s]}
            order = found[b, g, : len(norms)].argsort().tolist()
            assert order == [norms[each] for each in sorted(norms)]


@pytest.mark.parametrize(("window", "kernel_size"), [(1, 1), (2, 3), (3, 5), (4, 7)])
def test_attention_of_the_last_queries(window: int, kernel_size: int) -> None:
    """Causal among themselves, summed over queries and the heads of a group, and then the largest in reach."""
    queries = tokens(B, H, window, D, seed=3)
    found = scores(LastQueries(window, kernel_size), queries=queries)
    for b in range(B):
        newest = int(POSITIONS[b].max())
        for g in range(G):
            at = [k for k in POSITIONS[b, g].tolist() if k >= 0]
            votes = [0.0] * len(at)
            for h in (2 * g, 2 * g + 1):
                for i in range(window):
                    q = newest - window + 1 + i
                    seen = [s for s, k in enumerate(at) if k <= q]
                    products = [dot(queries[b, h, i].tolist(), KEYS[b, g, s].tolist()) / math.sqrt(D) for s in seen]
                    for s, share in zip(seen, softmax(products), strict=True):
                        votes[s] += share
            for s, k in enumerate(at):
                reached = range(max(0, s - kernel_size // 2), min(len(at), s + kernel_size // 2 + 1))
                expected = math.inf if k > newest - window else max(votes[t] for t in reached)
                assert math.isclose(found[b, g, s], expected, abs_tol=1e-12)


def test_queries_before_the_first_token_do_not_count() -> None:
    """Of a row that is shorter than the window, and whose other queries are zeros."""
    queries, keys = tokens(1, H, 6, D, seed=3), KEYS[:1, :, :3]
    queries[:, :, :2] = 0.0
    # Seen by the four queries at 0 to 3, of which the window keeps those from 2 on.
    positions = torch.tensor([[[0, 1, 3], [0, 1, 3]]])

    class Looser(LastQueries):
        """The window of the tokens that stay is smaller than that of the queries."""

        @property
        def needs_queries(self) -> int:
            return 6

    by, same = Looser(2, 1), Looser(2, 1)
    with_zeros = by(keys, keys, positions=positions, queries=queries)
    without = same(keys, keys, positions=positions, queries=queries[:, :, 2:])
    assert_same(with_zeros, without, atol=1e-12)
    assert with_zeros.isinf().tolist() == [[[False, False, True]] * 2]


def test_accumulated_attention_and_the_newest() -> None:
    weights = tokens(B, G, S, seed=4).abs()
    found = scores(AccumulatedAttention(newest=3), weights=weights)
    newest = POSITIONS.amax((1, 2), keepdim=True)
    assert_same(found, weights.masked_fill(newest - 3 < POSITIONS, math.inf).masked_fill(~REAL, 0.0), atol=0)


def test_sinks_and_the_newest() -> None:
    found = scores(SinksAndNewest(sinks=2))
    assert found[0].isinf().tolist() == [[True, True, *[False] * 5], [True, *[False] * 6]]
    assert found[0, 1, 1:].diff().min() > 0
    far = torch.arange(2**30, 2**30 + 5).expand(1, 1, 5)
    assert SinksAndNewest()(KEYS, VALUES, positions=far).diff().min() >= 0, "rounded, but in order"


def test_random_scores_depend_on_the_position_and_the_head_alone() -> None:
    found = Random(seed=3)(KEYS, VALUES, positions=POSITIONS)
    assert found[0, 0, 0] == found[1, 0, 0]
    assert found[0, 1, 2] == found[1, 1, 3], "both at position 4"
    many = Random()(KEYS, VALUES, positions=torch.arange(4000).expand(1, 2, -1))
    assert len({*many.flatten().tolist()}) > 7900
    assert bool((Random(1)(KEYS, VALUES, positions=torch.arange(4000).expand(1, 2, -1)) != many).float().mean() > 0.99)
    for each in many[0].argsort(-1)[:, :400]:
        assert 1800 < each.float().mean() < 2200, "no part of a sequence is preferred"
    kept = [{*row.argsort()[-400:].tolist()} for row in many[0]]
    assert 15 < len(kept[0] & kept[1]) < 75, "each head chooses for itself: 40 are expected"


def test_needs() -> None:
    assert Needs.of(LastQueries(5)) == (5, False)
    assert Needs.of(AccumulatedAttention()) == (0, True)
    for by in (KeyNorm(), Random(), SinksAndNewest(), lambda *_, **__: KEYS):
        assert Needs.of(by) == (0, False)


@pytest.mark.parametrize("make", [LastQueries, AccumulatedAttention, SinksAndNewest, Random])
def test_options_out_of_range(make: type[Policy]) -> None:
    for wrong in (-1, 1.5, True, "x"):
        with pytest.raises(ConfigurationError, match="expected a whole number"):
            make(wrong)
    with pytest.raises(ConfigurationError, match="kernel_size: expected an odd number"):
        LastQueries(4, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_16_bits_are_formed_in_32(dtype: torch.dtype) -> None:
    keys = (200 * KEYS).to(dtype)
    assert bool(KeyNorm()(keys, keys, positions=POSITIONS).isfinite().all())
    queries = tokens(B, H, 2, D, dtype=dtype)
    assert LastQueries(2)(keys, keys, positions=POSITIONS, queries=queries).dtype is torch.float32
