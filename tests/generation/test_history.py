"""Histories of rows: where a row, and its new tokens, begin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.generation.histories import padded, scores_of
from transformer.generation import DRY, FrequencyPenalty, History, HistoryProcessor, NoRepeatNGram, PresencePenalty

PROMPTS, NEW = [[3], [1, 2, 3], [4, 4]], [[5, 0], [5, 1], [4, 2]]


def test_rows_begin_after_their_padding() -> None:
    history = padded(PROMPTS, NEW)
    assert history.tokens.tolist() == [[3, 3, 3, 5, 0], [1, 2, 3, 5, 1], [4, 4, 4, 4, 2]]
    assert history.marked().tolist() == [[-1, -1, 3, 5, 0], [1, 2, 3, 5, 1], [-1, 4, 4, 4, 2]]
    assert history.is_new().tolist() == [[False, False, False, True, True]] * 3
    assert history.row_tokens() == {row: PROMPTS[row] + NEW[row] for row in range(3)}
    assert history.new_tokens() == dict(enumerate(NEW))


def test_ids_alone_are_all_new() -> None:
    history = History(torch.tensor([[7, 8]]))
    assert history.marked().tolist() == [[7, 8]]
    assert history.is_new().all()
    assert history.row_tokens() == history.new_tokens() == {0: [7, 8]}


def test_the_host_gets_the_rows_that_go_on() -> None:
    history = replace(padded(PROMPTS, NEW), live=[False, True, False])
    assert history.row_tokens() == {1: [1, 2, 3, 5, 1]}
    assert history.new_tokens() == {1: [5, 1]}


def test_a_part_of_the_rows() -> None:
    part = replace(padded(PROMPTS, NEW), live=[True, True, False]).rows([2, 0], torch.tensor([2, 0]))
    assert part.marked().tolist() == [[-1, 4, 4, 4, 2], [-1, -1, 3, 5, 0]]
    assert part.new_tokens() == {1: [5, 0]}
    assert [part.number(row) for row in range(2)] == [2, 0]
    assert [
        part.rows([1], torch.tensor([1])).number(0),
        History(part.tokens).rows([1], torch.tensor([1])).number(0),
    ] == [0, 1]
    assert History(part.tokens).rows([1], torch.tensor([1])).row_tokens() == {0: [3, 3, 3, 5, 0]}


@pytest.mark.parametrize("processor", [PresencePenalty(0.7), FrequencyPenalty(-1.5), NoRepeatNGram(2), DRY(0.8)])
def test_called_with_ids_alone(processor: HistoryProcessor) -> None:
    """As other libraries call processors: all ids are tokens of the row, and count as new."""
    tokens, scores = torch.tensor([[1, 2, 3, 1, 2], [0, 0, 0, 0, 5]]), scores_of(0, 2)
    out = processor(tokens, scores.clone())
    assert torch.equal(out, processor.process(History(tokens), scores))
    assert not torch.equal(out, scores)
