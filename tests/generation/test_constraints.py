"""Biases of sequences and allowed tokens, compared with transformers' classes and plain loops over each row alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import NoBadWordsLogitsProcessor, PrefixConstrainedLogitsProcessor, SequenceBiasLogitsProcessor

from tests.generation.histories import VOCAB, drawn, padded, scores_of
from transformer.errors import ArgumentError
from transformer.generation import History, PrefixAllowedTokens, SequenceBias

BIASES = {(2,): 1.5, (3,): -0.5, (1, 2): -4.0, (0, 2): 2.0, (4, 5, 0): 3.0, (1, 1, 1): -2.0, (5,) * 9: 1.0}
WORDS = [[2], [1, 3], [0, 3], [4, 5, 0], [1] * 8]


def biased(row: list[int], scores: list[float], biases: dict[tuple[int, ...], float]) -> list[float]:
    scores = list(scores)
    for sequence, bias in biases.items():
        if tuple(row[len(row) + 1 - len(sequence) :]) == sequence[:-1] and len(row) >= len(sequence) - 1:
            scores[sequence[-1]] += bias
    return scores


@pytest.mark.parametrize("biases", [BIASES, {(*word,): -math.inf for word in WORDS}], ids=["biases", "words"])
def test_sequences_in_padded_rows(biases: dict[tuple[int, ...], float]) -> None:
    for seed in range(12):
        prompts, new = drawn(seed, new=seed % 3)
        scores = scores_of(seed)
        out = SequenceBias(biases).process(padded(prompts, new), scores.clone())
        rows = [biased(a + b, row, biases) for a, b, row in zip(prompts, new, scores.tolist(), strict=True)]
        torch.testing.assert_close(out, torch.tensor(rows, dtype=torch.float64), rtol=1e-12, atol=0)
        assert not torch.equal(out, scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sequences_as_transformers(dtype: torch.dtype) -> None:
    pairs = [[list(sequence), bias] for sequence, bias in BIASES.items()]
    for seed in range(12):
        tokens, scores = torch.tensor(drawn(seed)[1]), scores_of(seed, dtype=dtype)
        theirs = SequenceBiasLogitsProcessor(pairs)(tokens, scores.clone())
        assert torch.equal(SequenceBias(BIASES)(tokens, scores.clone()), theirs)
        assert torch.equal(SequenceBias(pairs)(tokens, scores.clone()), theirs)
        excluded = SequenceBias([(word, -math.inf) for word in WORDS])(tokens, scores.clone())
        assert torch.equal(excluded, NoBadWordsLogitsProcessor(WORDS)(tokens, scores.clone()))


def test_padding_begins_no_sequence() -> None:
    history, scores = padded([[1], [0, 1, 2]], [[], []]), torch.zeros(2, VOCAB)
    assert not SequenceBias({(1, 1, 4): 1.0}).process(history, scores).any()
    assert SequenceBias({(1, 4): 1.0}).process(history, scores)[:, 4].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_biases_of_any_size_leave_scores(dtype: torch.dtype) -> None:
    scores = torch.tensor([[1e37, -1e37, 0.0, -math.inf, 5.0, -math.inf]], dtype=dtype)
    huge = {(token,): 1.7e308 for token in range(6)} | {(0, token): 1.7e308 for token in range(6)} | {(4,): -math.inf}
    out = SequenceBias(huge)(torch.tensor([[0]]), scores)
    assert not out.isnan().any()
    assert (out == math.inf).sum() == 0
    assert out.isfinite().tolist() == [[True, True, True, False, False, False]]


@pytest.mark.parametrize(
    "wrong",
    [
        3,
        [[[1], 2.0, 3.0]],
        [[[], 2.0]],
        [[[-1], 2.0]],
        [[[True], 2.0]],
        [[1, 2.0]],
        {1: 2.0},
        {(1,): math.inf},
        {(1,): math.nan},
        {(1,): "2"},
        {(1,): 10**400},
        [5],
    ],
)
def test_biases_are_numbers_of_sequences_of_ids(wrong: object) -> None:
    with pytest.raises(ArgumentError, match=r"^sequence_bias: expected \{\(id, \.\.\.\): bias\} or pairs"):
        SequenceBias(wrong)


def test_ids_of_sequences_are_in_the_vocabulary() -> None:
    with pytest.raises(ArgumentError, match=r"expected ids below 6, the size of the vocabulary, got 7"):
        SequenceBias({(1, 7, 2): 1.0})(torch.tensor([[0]]), torch.zeros(1, VOCAB))


def test_allowed_tokens_as_transformers() -> None:
    def allowed(number: int, tokens: torch.Tensor) -> list[int]:
        return [number % VOCAB, int(tokens[-1]), int(tokens.sum()) % VOCAB]

    for num_beams in (1, 2):
        for seed in range(6):
            tokens, scores = torch.tensor(drawn(seed, rows=6)[1]), torch.randn(6, VOCAB)
            theirs = PrefixConstrainedLogitsProcessor(allowed, num_beams)(tokens, scores)
            history = History(tokens, numbers=[row // num_beams for row in range(6)])
            assert torch.equal(PrefixAllowedTokens(allowed).process(history, scores), theirs)


def test_allowed_tokens_of_padded_rows_that_go_on() -> None:
    """The function sees a row without its padding, and no row that has ended."""
    prompts, new = drawn(1, rows=3)
    whole, seen = padded(prompts, new), {}

    def allowed(number: int, tokens: torch.Tensor) -> torch.Tensor:
        seen[number] = tokens.tolist()
        return tokens[-1:]

    history = replace(whole, live=[True, False, True])
    out = PrefixAllowedTokens(allowed).process(history, torch.zeros(3, VOCAB))
    assert seen == {row: prompts[row] + new[row] for row in (0, 2)}
    assert out[[0, 2]].isfinite().nonzero().tolist() == [[0, new[0][-1]], [1, new[2][-1]]]
    seen.clear()
    PrefixAllowedTokens(allowed).process(whole.rows([2, 0], torch.tensor([2, 0])), torch.zeros(2, VOCAB))
    assert seen == {2: prompts[2] + new[2], 0: prompts[0] + new[0]}, "numbers stay, in a part of the rows"


@pytest.mark.parametrize("answer", [[], [VOCAB], [0, -1], None, 4])
def test_at_least_one_token_of_the_vocabulary_is_allowed(answer: object) -> None:
    with pytest.raises(ArgumentError, match=r"^prefix_allowed_tokens_fn: expected at least one id .* below 6"):
        PrefixAllowedTokens(lambda *_: answer)(torch.tensor([[0]]), torch.zeros(1, VOCAB))


def test_a_function_is_called() -> None:
    with pytest.raises(ArgumentError, match=r"^prefix_allowed_tokens_fn: expected a function, got 3"):
        PrefixAllowedTokens(3)
