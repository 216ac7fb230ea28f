"""Attention with its log-sum-exp: against float64, and merged of parts equal to attention over all keys."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.internals import without_compiled_kernels
from transformer.kernels import AttentionState, Kernel, Positions, attention_state, backend, serves_parts, tuned
from transformer.kernels.compiled import are_available

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
"""16-bit numbers are computed in float32, and not rounded."""

POSITIONS = {
    "all keys": Positions((0,), (0,), (11,), (0,), causal=False),
    "ends a part": Positions((2,), (2,), (11,), (8,)),
    "a chunk alone": Positions((0,), (0,), (3,), (0,)),
    "rows that end apart": Positions((5,), (5,), (13, 6, 9), (10, 5, 9)),
    "a row without a key": Positions((0,), (0,), (7, 0, 3), (6, 0, 0)),
    "prefixes of several lengths": Positions((0,), (0,), (4, 11, 1), (0,), causal=False),
}
"""Of 3 rows, and of 3 queries each: not all of them have a key of their own."""


@pytest.fixture(params=["compiled", "PyTorch", "small tiles"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "compiled" and not are_available():
        pytest.skip("numba is missing, or turned off")
    if request.param != "compiled":
        without_compiled_kernels(monkeypatch)
    tiles = {"tile_bytes": 200, "upcast_keys": 4} if request.param == "small tiles" else {}
    with torch.no_grad(), tuned(min_parallel_bytes=0, min_part_keys=1, **tiles):
        yield request.param


def inputs(dtype: torch.dtype, groups: int = 2, keys: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values as parts of buffers with NaN around them."""
    torch.manual_seed(0)
    buffers = torch.full((2, 3, groups, keys + 4, 8), math.nan)
    buffers[:, :, :, 2 : keys + 2] = torch.randn(2, 3, groups, keys, 8)
    key, value = buffers.to(dtype)[:, :, :, 2 : keys + 2]
    return torch.randn(3, 4, 3, 8).to(dtype), key, value


def exact(
    query: Tensor, key: Tensor, value: Tensor, positions: Positions, softcap: float | None
) -> Iterator[tuple[tuple[int, int, int], Tensor, float]]:
    """Row, head and token with its result and log-sum-exp, one query at a time; padding after a row's end left out."""
    per_group = query.shape[1] // key.shape[1]
    for row, (first, start, end, past) in enumerate(positions.of_rows(3)):
        for head in range(query.shape[1]):
            for token in range(query.shape[2]):
                last = min(end, past + token + 1) if positions.causal else end
                if positions.causal and past + token >= end:
                    continue
                keys, values = (x[row, head // per_group, start - first : last - first].double() for x in (key, value))
                scores = keys @ query[row, head, token].double() * 0.3
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                yield (row, head, token), torch.softmax(scores, 0) @ values, float(torch.logsumexp(scores, 0))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("name", POSITIONS)
def test_each_query_alone(name: str, groups: int, softcap: float | None, dtype: torch.dtype) -> None:
    query, key, value = inputs(dtype, groups)
    positions = POSITIONS[name]
    for row, (first, start, end, _) in enumerate(positions.of_rows(3)):
        key[row, :, : start - first] = key[row, :, end - first :] = math.nan
        value[row, :, : start - first] = value[row, :, end - first :] = math.nan
    out, lse = attention_state(Kernel(0.3, softcap), query, key, value, positions)
    assert out.dtype == lse.dtype == (dtype if dtype == torch.float64 else torch.float32)
    checked = 0
    for (row, head, token), expected, its_lse in exact(query, key, value, positions, softcap):
        torch.testing.assert_close(out[row, head, token].double(), expected, atol=TOLERANCE[dtype], rtol=0)
        assert float(lse[row, head, token]) == pytest.approx(its_lse, abs=TOLERANCE[dtype] * 4)
        checked += 1
    assert checked >= 16
    unseen = lse == -math.inf
    assert not unseen.all()
    assert bool((out[unseen] == 0).all())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_parts_are_merged_to_the_whole(dtype: torch.dtype) -> None:
    """Also with parts that have no key, and one that has a far larger score."""
    query, key, value = inputs(dtype)
    key[:, :, 0] *= 10
    kernel, states = Kernel(0.3), []
    for begin, end in ((0, 4), (4, 4), (4, 5), (5, 11)):
        part = Positions((0,), (0,), (end - begin,), (0,), causal=False)
        states.append(attention_state(kernel, query, key[:, :, begin:end], value[:, :, begin:end], part))
    merged = states[0]
    for state in states[1:]:
        merged = merged.merged(state)
    whole = attention_state(kernel, query, key, value, POSITIONS["all keys"])
    for one, other in zip(merged, whole, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE[dtype], rtol=1e-6)


def test_nothing_and_something() -> None:
    """A query without a key in one part has its result from the other."""
    none = AttentionState(torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1), -math.inf))
    some = AttentionState(torch.randn(1, 1, 1, 4), torch.zeros(1, 1, 1))
    for merged in (none.merged(some), some.merged(none)):
        assert torch.equal(merged.out, some.out)
        assert torch.equal(merged.lse, some.lse)


@pytest.mark.parametrize("turned", [False, True])
def test_a_small_share_keeps_its_digits(turned: bool) -> None:
    """A few keys with large values beside thousands that even out."""
    many = AttentionState(torch.full((1, 1, 1, 4), 0.001), torch.full((1, 1, 1), 9.0))
    few = AttentionState(torch.full((1, 1, 1, 4), 3.0), torch.full((1, 1, 1), 0.3))
    exact = AttentionState(*(x.double() for x in many)).merged(AttentionState(*(x.double() for x in few))).out
    ours = few.merged(many) if turned else many.merged(few)
    torch.testing.assert_close(ours.out.double(), exact, atol=0, rtol=5e-7)


def test_calls_that_parts_do_not_serve() -> None:
    query = torch.randn(1, 1, 1, 4)
    assert serves_parts(query)
    with torch.enable_grad():
        assert not serves_parts(query)
    with backend("reference"):
        assert not serves_parts(query)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert not serves_parts(query)
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves_parts(query)
