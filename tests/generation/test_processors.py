"""Filters and penalties, compared with their definitions and transformers' classes, at extreme numbers too."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from transformer.errors import ArgumentError
from transformer.generation import MinP, RepetitionPenalty, Temperature, TopK, TopP
from transformer.generation.processors import LARGE_VOCABULARY

LOGITS = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)) * 3
TOKENS = torch.tensor([[0, 4, 4], [8, 1, 2], [3, 3, 3], [5, 6, 7]])
EXTREMES = [5e-324, 1e-300, 1e-46, 1e-38, 1e-7, 0.3, 1.0, 7.0, 1e30, 1e39, 1.7e308]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (TopK(3), TopKLogitsWarper(3)),
        (TopK(1), TopKLogitsWarper(1)),
        (TopK(50), TopKLogitsWarper(50)),
        (TopP(0.7), TopPLogitsWarper(0.7)),
        (TopP(0.01), TopPLogitsWarper(0.01)),
        (MinP(0.1), MinPLogitsWarper(0.1)),
        (RepetitionPenalty(1.7), RepetitionPenaltyLogitsProcessor(1.7)),
        (RepetitionPenalty(0.4), RepetitionPenaltyLogitsProcessor(0.4)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_transformers(ours, theirs, dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    torch.testing.assert_close(ours(TOKENS, logits.clone()), theirs(TOKENS, logits.clone()), rtol=0, atol=1e-6)


def test_temperature_as_transformers() -> None:
    """Up to a constant of each row, of which no probability knows."""
    for temperature in (0.2, 1.0, 3.0):
        ours, theirs = Temperature(temperature)(TOKENS, LOGITS), TemperatureLogitsWarper(temperature)(TOKENS, LOGITS)
        torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


def test_by_their_definitions() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log()
    none = torch.zeros(1, 0, dtype=torch.int64)

    def kept(processor) -> list[int]:
        return processor(none, logits).isfinite()[0].nonzero().flatten().tolist()

    assert kept(TopK(2)) == [0, 1]
    assert kept(TopP(0.79)) == [0, 1]
    assert kept(TopP(0.81)) == [0, 1, 2]
    assert kept(TopP(1e-9)) == [0]
    assert kept(MinP(0.19)) == [0, 1, 2]
    assert kept(MinP(1.0)) == [0]
    halves = TopP(0.5)(none, torch.zeros(1, 2))
    assert halves.isfinite().sum() == 1, "one half is enough"
    tied = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert TopK(1)(none, tied).isfinite().tolist() == [[False, True, True, False]]
    assert torch.equal(RepetitionPenalty(2.0)(none, logits), logits)


def test_a_token_that_must_not_be_taken_stays_so() -> None:
    logits = torch.tensor([[1.0, -math.inf, 2.0, -math.inf]])
    for processor in (
        RepetitionPenalty(0.5),
        RepetitionPenalty(1e300),
        Temperature(1e300),
        Temperature(1e-300),
        TopK(3),
    ):
        assert processor(torch.tensor([[1, 2]]), logits)[0, [1, 3]].tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", EXTREMES)
def test_numbers_of_any_size_leave_probabilities(number: float, dtype: torch.dtype) -> None:
    """Below or above the range of the dtype: the most probable token stays, and nothing becomes NaN."""
    for scale in (0.0, 1.0, 1e4):
        logits = LOGITS.to(dtype) * scale
        filters = [TopP(number), MinP(number)] if number <= 1 else []
        for processor in [RepetitionPenalty(number), Temperature(number), *filters]:
            probability = processor(TOKENS, logits).softmax(-1)
            assert probability.isfinite().all(), processor
            if not isinstance(processor, RepetitionPenalty):
                assert probability.gather(1, logits.argmax(-1, keepdim=True)).gt(0).all(), processor


ANY = st.one_of(st.floats(), st.integers(), st.booleans(), st.none(), st.text(max_size=2))
MEANING = {
    RepetitionPenalty: lambda n: 0 < n < math.inf,
    Temperature: lambda n: 0 < n < math.inf,
    TopP: lambda n: 0 < n <= 1,
    MinP: lambda n: 0 < n <= 1,
}


@settings(max_examples=60)
@given(ANY, st.sampled_from(sorted(MEANING, key=str)))
def test_a_meaning_or_a_refusal(number: object, kind: type) -> None:
    if type(number) in (int, float) and MEANING[kind](number):
        assert kind(number)(TOKENS, LOGITS).softmax(-1).isfinite().all()
    else:
        with pytest.raises(ArgumentError, match=r": expected a finite number above 0"):
            kind(number)


@pytest.mark.parametrize("k", [0, -1, 1.0, True, math.nan, None, 2**70])
def test_top_k(k: object) -> None:
    if k == 2**70:
        assert torch.equal(TopK(k)(TOKENS, LOGITS), LOGITS)
    else:
        with pytest.raises(ArgumentError, match=r"^top_k: expected a whole number"):
            TopK(k)


# --- probabilities and what is left of them, as the tests of other projects have them -----------------------------

TENTHS = [0.1, 0.2, 0.3, 0.4]
PUBLISHED = [
    # llama.cpp, tests/test-sampling.cpp
    (TopK(1), TENTHS, [0, 0, 0, 1]),
    (TopK(3), TENTHS, [0, 0.22222, 0.33333, 0.44444]),
    (TopK(4), TENTHS, TENTHS),
    (TopP(1e-9), TENTHS, [0, 0, 0, 1]),
    (TopP(0.7), TENTHS, [0, 0, 0.428571, 0.571429]),
    (TopP(0.8), TENTHS, [0, 0.22222, 0.33333, 0.44444]),
    (TopP(1.0), TENTHS, TENTHS),
    (MinP(0.24), TENTHS, TENTHS),
    (MinP(0.26), TENTHS, [0, 0.2 / 0.9, 0.3 / 0.9, 0.4 / 0.9]),
    (MinP(0.49), TENTHS, [0, 0.2 / 0.9, 0.3 / 0.9, 0.4 / 0.9]),
    (MinP(0.51), TENTHS, [0, 0, 0.3 / 0.7, 0.4 / 0.7]),
    (MinP(0.74), TENTHS, [0, 0, 0.3 / 0.7, 0.4 / 0.7]),
    (MinP(0.76), TENTHS, [0, 0, 0, 1]),
    (MinP(1.0), TENTHS, [0, 0, 0, 1]),
    (Temperature(1.0), TENTHS, TENTHS),
    (RepetitionPenalty(50.0), [0.2] * 5, [0, 0.25, 0.25, 0.25, 0.25]),
    # transformers, tests/generation/test_logits_process.py
    (TopP(0.8), [0.3, 0.1, 0.1, 0.5], [0.375, 0, 0, 0.625]),
    (TopP(0.8), [0.15, 0.3, 0.3, 0.25], [0, 0.3 / 0.85, 0.3 / 0.85, 0.25 / 0.85]),
    (MinP(0.1), [0.9, 0.0274, 0.047, 0.0256], [1, 0, 0, 0]),
    (MinP(0.1), [0.15, 0.3, 0.3, 0.25], [0.15, 0.3, 0.3, 0.25]),
    # mlx-lm, tests/test_sample_utils.py
    (TopP(0.4), [0.0, 0.5, 0.4, 0.1], [0, 1, 0, 0]),
    (TopP(0.6), [0.0, 0.5, 0.4, 0.1], [0, 0.5556, 0.4444, 0]),
    (TopP(0.95), [0.0, 0.5, 0.4, 0.1], [0, 0.5, 0.4, 0.1]),
    (MinP(0.8), [0.9, 0.0, 0.0, 0.1], [1, 0, 0, 0]),
    (MinP(0.05), [0.9, 0.0, 0.0, 0.1], [0.9, 0, 0, 0.1]),
    # sums that tie with p
    (TopP(0.9), TENTHS, [0, 0.22222, 0.33333, 0.44444]),
    (TopP(0.5), [0.25] * 4, [0.5, 0.5, 0, 0]),
    (TopP(0.75), [0.25] * 4, [1 / 3, 1 / 3, 1 / 3, 0]),
    (TopP(0.8), [0.5, 0.3, 0.1, 0.06, 0.04], [0.625, 0.375, 0, 0, 0]),
    (TopP(0.9), [0.5, 0.4, 0.1], [0.5 / 0.9, 0.4 / 0.9, 0]),
    (TopP(0.6), [0.2] * 5, [1 / 3, 1 / 3, 1 / 3, 0, 0]),
    (MinP(0.5), [0.25, 0.5, 0.125, 0.125], [1 / 3, 2 / 3, 0, 0]),
]


@pytest.mark.parametrize(("processor", "given", "left"), PUBLISHED)
def test_published_constants(processor, given: list[float], left: list[float]) -> None:
    out = processor(torch.tensor([[0]]), torch.tensor([given]).log()).softmax(-1)
    torch.testing.assert_close(out, torch.tensor([left], dtype=torch.float32), rtol=0, atol=1e-4)


@pytest.mark.parametrize("p", [1e-9, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("spread", [0.5, 3.0, 6.0])
def test_the_nucleus_of_a_large_vocabulary(spread: float, p: float) -> None:
    """The tokens that a sort of all of them keeps, ties by their order, also where others are excluded already."""
    generator = torch.Generator().manual_seed(7)
    scores = spread * torch.randn(3, LARGE_VOCABULARY, dtype=torch.float64, generator=generator)
    scores[1] = scores[1].round(decimals=1)
    scores[2, ::2] = -math.inf
    for row, out in zip(scores, TopP(p)(TOKENS[:3], scores), strict=True):
        ordered, order = row.sort(descending=True, stable=True)
        sums = ordered.softmax(-1).cumsum(-1)
        count = int((sums < p).sum()) + 1
        expected = torch.full_like(row, -math.inf)
        expected[order[:count]] = row[order[:count]]
        assert torch.equal(out, expected)
    if spread > 1 and p < 0.99:
        assert (scores.softmax(-1) > (1 - p) / (2 * LARGE_VOCABULARY)).double().mean() < 0.5, "the quick way"
