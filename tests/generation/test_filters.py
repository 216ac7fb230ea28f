"""Typical sampling and exclusion of the top choices, compared with transformers, published constants and loops."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import TypicalLogitsWarper

from tests.generation.histories import scores_of
from transformer.errors import ArgumentError
from transformer.generation import XTC, MinP, TypicalP

NONE = torch.zeros(1, 0, dtype=torch.int64)


def left(processor, probabilities: list[float]) -> list[float]:
    out = processor(NONE, torch.tensor([probabilities], dtype=torch.float64).log()).softmax(-1)
    return [round(each, 5) for each in out[0].tolist()]


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_typical_as_transformers(p: float, dtype: torch.dtype) -> None:
    for seed in range(6):
        scores = scores_of(seed, dtype=dtype, vocabulary=40)
        ours, theirs = TypicalP(p)(NONE, scores), TypicalLogitsWarper(p)(NONE, scores)
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, scores)


def typical(scores: list[float], p: float) -> set[int]:
    total = sum(map(math.exp, scores))
    chances = [math.exp(score) / total for score in scores]
    entropy = -sum(chance * math.log(chance) for chance in chances if chance)
    distances = [abs(-math.log(chance) - entropy) if chance else math.inf for chance in chances]
    kept, mass = set(), 0.0
    for token in sorted(range(len(scores)), key=lambda token: distances[token]):
        kept.add(token)
        mass += chances[token]
        if mass >= p:
            break
    return kept


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_typical_by_its_definition(p: float) -> None:
    for seed in range(6):
        scores = scores_of(seed, vocabulary=20)
        for row, out in zip(scores.tolist(), TypicalP(p)(NONE, scores), strict=True):
            assert set(out.isfinite().nonzero().flatten().tolist()) == typical(row, p)


@pytest.mark.parametrize("p", [1.0, 1.0 - 1e-12])
def test_a_rounded_sum_excludes_nothing(p: float) -> None:
    """Of float32 the sum over all tokens can be below `p`, or 1 before the last of them."""
    for spread in (1.0, 10.0):
        scores = spread * torch.randn(50, 3000, generator=torch.Generator().manual_seed(0))
        out = TypicalP(p)(NONE, scores)
        assert not out.isnan().any()
        assert p < 1 or torch.equal(out, scores)


def test_typical_published_constants() -> None:
    # llama.cpp, tests/test-sampling.cpp
    assert left(TypicalP(0.5), [0.97, 0.01, 0.01, 0.01]) == [1, 0, 0, 0]
    assert left(TypicalP(0.5), [0.4, 0.2, 0.2, 0.2]) == [0, 0.33333, 0.33333, 0.33333]
    assert left(TypicalP(1.0), [0.97, 0.03, 0.0]) == [0.97, 0.03, 0]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        # llama.cpp, tests/test-sampling.cpp
        (0.09, [1, 0, 0, 0]),
        (0.19, [0.33333, 0.66667, 0, 0]),
        (0.29, [0.16667, 0.33333, 0.5, 0]),
        (0.49, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_xtc_published_constants(threshold: float, expected: list[float]) -> None:
    assert left(XTC(1.0, threshold), [0.1, 0.2, 0.3, 0.4]) == expected


def without_top_choices(scores: list[float], threshold: float) -> list[float]:
    total = sum(map(math.exp, scores))
    chances = [math.exp(score) / total for score in scores]
    top = [chance for chance in chances if chance >= threshold]
    return [
        -math.inf if chance >= threshold and chance > min(top) else score
        for chance, score in zip(chances, scores, strict=True)
    ]


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.3, 0.6, 1.0])
def test_xtc_by_its_definition(threshold: float) -> None:
    for seed in range(6):
        scores = scores_of(seed)
        expected = torch.tensor([without_top_choices(row, threshold) for row in scores.tolist()], dtype=torch.float64)
        assert torch.equal(XTC(1.0, threshold)(NONE, scores), expected)
        assert threshold > 0.1 or not torch.equal(scores, expected)


def test_xtc_applies_at_some_steps() -> None:
    """Each row and step by its own chance, and the same again from the same seed."""
    scores = torch.tensor([[0.6, 0.4]]).log().repeat(4000, 1)

    def changed(seed: int, probability: float) -> torch.Tensor:
        rule = XTC(probability, 0.1, torch.Generator().manual_seed(seed))
        return torch.cat([rule(NONE, scores)[:, 0].isinf() for _ in range(2)])

    assert changed(0, 0.3).double().mean() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(changed(0, 0.3), changed(0, 0.3))
    assert not torch.equal(changed(0, 0.3), changed(1, 0.3))
    first, second = changed(0, 0.3).chunk(2)
    assert not torch.equal(first, second)
    assert changed(0, 1.0).all()
    torch.manual_seed(0)
    once = XTC(0.5)(NONE, scores)
    torch.manual_seed(0)
    assert torch.equal(XTC(0.5)(NONE, scores), once)


def test_xtc_after_another_filter() -> None:
    """Excluded tokens have no probability, so those that are left are the choices."""
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert XTC(1.0, 0.1)(NONE, MinP(0.5)(NONE, scores)).isfinite().tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("wrong", [0, -0.1, 1.1, math.nan, None, "1", True])
def test_numbers_above_0_and_at_most_1(wrong: object) -> None:
    with pytest.raises(ArgumentError, match=r"^typical_p: expected a finite number above 0 and at most 1"):
        TypicalP(wrong)
    with pytest.raises(ArgumentError, match=r"^xtc_probability: expected a finite number above 0 and at most 1"):
        XTC(wrong)
    with pytest.raises(ArgumentError, match=r"^xtc_threshold: expected a finite number above 0 and at most 1"):
        XTC(0.5, wrong)


def test_a_generator_of_pytorch() -> None:
    with pytest.raises(ArgumentError, match=r"^generator: expected a torch\.Generator or None, got 3"):
        XTC(0.5, 0.1, 3)
