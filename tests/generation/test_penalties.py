"""Penalties of tokens in the row, compared with plain loops over each row alone, and transformers' classes."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor

from tests.generation.histories import VOCAB, drawn, padded, scores_of
from transformer.errors import ArgumentError
from transformer.generation import DRY, FrequencyPenalty, History, HistoryProcessor, NoRepeatNGram, PresencePenalty

SEEDS = range(12)


def presence_and_frequency(new: list[int], scores: list[float], presence: float, frequency: float) -> list[float]:
    """The formula of OpenAI's API."""
    return [score - new.count(token) * frequency - (token in new) * presence for token, score in enumerate(scores)]


def without_repeated_sequences(row: list[int], scores: list[float], size: int) -> list[float]:
    seen = [row[start : start + size] for start in range(len(row) - size + 1)]
    return [
        -math.inf if len(row) >= size - 1 and [*row[len(row) + 1 - size :], token] in seen else score
        for token, score in enumerate(scores)
    ]


def dry(row: list[int], scores: list[float], rule: DRY) -> list[float]:
    """By the length of the longest match, counted token by token from each earlier place."""
    longest = dict.fromkeys(range(len(scores)), 0)
    for place in range(len(row) - 1):
        length = 0
        while length <= place and row[place - length] == row[-1 - length] not in rule.sequence_breakers:
            length += 1
        if row[place + 1] not in rule.sequence_breakers:
            longest[row[place + 1]] = max(longest[row[place + 1]], length)
    powers = {token: length - rule.allowed_length for token, length in longest.items() if length >= rule.allowed_length}
    return [
        score - rule.multiplier * rule.base ** min(powers[token], 50) if token in powers else score
        for token, score in enumerate(scores)
    ]


def check(processor: HistoryProcessor, expected) -> None:
    """Padded rows in one batch are what `expected(prompt, new, scores)` gives for each row."""
    for seed in SEEDS:
        prompts, new = drawn(seed)
        for dtype in (torch.float64, torch.float32):
            scores = scores_of(seed, dtype=dtype)
            out = processor.process(padded(prompts, new), scores.clone())
            assert out.dtype == dtype
            rows = [expected(*row) for row in zip(prompts, new, scores.tolist(), strict=True)]
            tolerance = 1e-12 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(out, torch.tensor(rows, dtype=dtype), rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("penalty", [0.7, -1.5, 2.0])
def test_presence(penalty: float) -> None:
    check(PresencePenalty(penalty), lambda _, new, scores: presence_and_frequency(new, scores, penalty, 0.0))


@pytest.mark.parametrize("penalty", [0.7, -1.5, 2.0])
def test_frequency(penalty: float) -> None:
    check(FrequencyPenalty(penalty), lambda _, new, scores: presence_and_frequency(new, scores, 0.0, penalty))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
def test_no_sequence_twice(size: int) -> None:
    check(NoRepeatNGram(size), lambda prompt, new, scores: without_repeated_sequences(prompt + new, scores, size))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
def test_no_sequence_twice_as_transformers(size: int) -> None:
    ours, theirs = NoRepeatNGram(size), NoRepeatNGramLogitsProcessor(size)
    for seed in SEEDS:
        tokens, scores = torch.tensor(drawn(seed)[1]), scores_of(seed)
        assert torch.equal(ours(tokens, scores.clone()), theirs(tokens, scores.clone()))


def test_padding_completes_no_sequence() -> None:
    """The first token of a row stands at its padding; taken for tokens, it would be a repetition."""
    history, scores = padded([[2], [0, 1, 2, 2]], [[2], [3]]), torch.zeros(2, VOCAB)
    assert NoRepeatNGram(2).process(history, scores).isfinite()[0].tolist() == [True, True, False, True, True, True]
    assert NoRepeatNGram(3).process(history, scores).isfinite()[0].all()
    assert torch.equal(DRY(1.0).process(history, scores)[0], scores[0])
    assert FrequencyPenalty(1.0).process(history, scores)[0].tolist() == [0, 0, -1, 0, 0, 0]


@pytest.mark.parametrize(
    "rule",
    [
        DRY(0.8),
        DRY(0.8, base=1.0),
        DRY(2.0, base=3.0, allowed_length=1),
        DRY(0.8, allowed_length=4),
        DRY(0.8, allowed_length=1, sequence_breakers=(0, 3)),
        DRY(0.8, allowed_length=60),
    ],
    ids=repr,
)
def test_dry(rule: DRY) -> None:
    check(rule, lambda prompt, new, scores: dry(prompt + new, scores, rule))


def test_dry_over_long_repetitions() -> None:
    """A match of more tokens than are counted, which ends at a breaker, and one that overlaps with itself."""
    loop = [1, 2, 3, 4] * 30
    for row in (loop, loop + loop[:-3], [5] * 70, [1, 2, 5, 3, 1, 2, 5, 3, 1, 2]):
        for rule in (DRY(0.8), DRY(0.8, allowed_length=20), DRY(0.8, allowed_length=1, sequence_breakers=[5])):
            out = rule(torch.tensor([row]), torch.zeros(1, VOCAB, dtype=torch.float64))
            expected = torch.tensor([dry(row, [0.0] * VOCAB, rule)], dtype=torch.float64)
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=0)


def test_dry_breaks_a_loop() -> None:
    """Each round costs the next token more, until another one is more probable."""
    scores = torch.tensor([[0.0, 9.0, 0.0]])
    costs = [-float(DRY(0.8)(torch.tensor([[1] * count]), scores)[0, 1] - 9.0) for count in range(1, 8)]
    assert costs[:2] == [0.0, 0.0]
    assert costs[2:] == pytest.approx([0.8 * 1.75**power for power in range(5)], rel=1e-5)


EXTREMES = [5e-324, 1e-46, 0.3, 7.0, 1e30, 1e39, 1.7e308, 10**400]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", [*EXTREMES, -7.0, -1.7e308])
def test_numbers_of_any_size_leave_scores(number: float, dtype: torch.dtype) -> None:
    """Below or above the range of the dtype: nothing becomes NaN or infinite, and excluded tokens stay so."""
    if number == 10**400:
        with pytest.raises(ArgumentError):
            FrequencyPenalty(number)
        return
    processors = [PresencePenalty(number), FrequencyPenalty(number)]
    if number > 0:
        processors += [DRY(number, allowed_length=1), DRY(0.8, base=max(number, 1.0))]
        processors += [DRY(number, base=1e300)]
    history = padded([[1, 2, 1]] * 5, [[2, 1] * 30] * 5)
    for processor in processors:
        for scale in (0.0, 1.0, 1e37):
            scores = scores_of(3).nan_to_num(0.0).clamp(-9, 9).to(dtype) * scale
            scores[::2, 1] = -math.inf
            out = processor.process(history, scores)
            assert torch.equal(out.isfinite(), scores.isfinite()), processor
            assert not out.isnan().any()


@pytest.mark.parametrize("wrong", [None, "1", math.nan, math.inf, True])
@pytest.mark.parametrize("kind", [PresencePenalty, FrequencyPenalty])
def test_penalties_are_finite_numbers(kind: type, wrong: object) -> None:
    with pytest.raises(ArgumentError, match=r"^(presence|frequency)_penalty: expected a finite number"):
        kind(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multiplier": 0}, "dry_multiplier: expected a finite number above 0"),
        ({"multiplier": math.nan}, "dry_multiplier: expected a finite number above 0"),
        ({"multiplier": 1, "base": 0.9}, "dry_base: expected a finite number of at least 1"),
        ({"multiplier": 1, "base": "2"}, "dry_base: expected a finite number of at least 1"),
        ({"multiplier": 1, "allowed_length": 0}, "dry_allowed_length: expected a whole number"),
        ({"multiplier": 1, "allowed_length": 2.0}, "dry_allowed_length: expected a whole number"),
        ({"multiplier": 1, "sequence_breakers": [-1]}, "dry_sequence_breakers: expected a list of ids"),
        ({"multiplier": 1, "sequence_breakers": "\n"}, "dry_sequence_breakers: expected a list of ids"),
        ({"multiplier": 1, "sequence_breakers": 5}, "dry_sequence_breakers: expected a list of ids"),
    ],
)
def test_options_of_dry(options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        DRY(**options)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None])
def test_sizes_of_sequences(size: object) -> None:
    with pytest.raises(ArgumentError, match=r"^no_repeat_ngram_size: expected a whole number"):
        NoRepeatNGram(size)


def test_one_token_of_history() -> None:
    scores = torch.zeros(1, VOCAB)
    for processor in (DRY(0.8, allowed_length=1), NoRepeatNGram(2)):
        assert torch.equal(processor.process(History(torch.tensor([[3]])), scores), scores)
