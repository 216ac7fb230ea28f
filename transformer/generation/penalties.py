"""Penalties of tokens by how often, or after which tokens, they were in the row before."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import on_device
from ..errors import ArgumentError, shown
from .history import PADDING, History, HistoryProcessor
from .processors import check_count, check_number, is_finite, is_id

INF = math.inf

MOST_BEYOND = 50
"""Tokens beyond the allowed length that `DRY` counts: 50 powers of its base, 1.75, are a penalty of 1e12."""

NEVER = PADDING - 1
"""Id that equals no token and no padding."""


@dataclass(frozen=True, slots=True)
class PresencePenalty(HistoryProcessor):
    """Lowers the scores of tokens that were generated in the row by `penalty`: presence_penalty of OpenAI's API.

    Tokens of the prompt do not count. A `penalty` below 0 raises scores.

    Raises ArgumentError for a `penalty` that is not a finite number.
    """

    penalty: float

    def __post_init__(self) -> None:
        _check_penalty("presence_penalty", self.penalty)

    def process(self, history: History, scores: Tensor) -> Tensor:
        return lowered(scores, (_counts(history, scores) > 0).to(scores.dtype), self.penalty)


@dataclass(frozen=True, slots=True)
class FrequencyPenalty(HistoryProcessor):
    """Lowers the score of a token by `penalty` for each time that it was generated in the row: OpenAI's API.

    Tokens of the prompt do not count. A `penalty` below 0 raises scores.

    Raises ArgumentError for a `penalty` that is not a finite number.
    """

    penalty: float

    def __post_init__(self) -> None:
        _check_penalty("frequency_penalty", self.penalty)

    def process(self, history: History, scores: Tensor) -> Tensor:
        return lowered(scores, _counts(history, scores), self.penalty)


@dataclass(frozen=True, slots=True)
class NoRepeatNGram(HistoryProcessor):
    """Excludes tokens that would complete a sequence of `size` tokens that is in the row, prompt included.

    As `no_repeat_ngram_size` of fairseq and transformers (arXiv 1705.04304). 1 excludes all tokens of the row.

    Raises ArgumentError for a `size` that is not a whole number from 1.
    """

    size: int

    def __post_init__(self) -> None:
        check_count("no_repeat_ngram_size", self.size)

    def process(self, history: History, scores: Tensor) -> Tensor:
        tokens, vocabulary = history.marked(), scores.shape[1]
        length = tokens.shape[1]
        if length < self.size:
            return scores
        # Padding in it equals no other: behind it the row begins, and there is one such place.
        begun = tokens[:, length + 1 - self.size :]
        sequences = tokens.unfold(1, self.size, 1)
        last = sequences[..., -1]
        completed = (sequences[..., :-1] == begun.unsqueeze(1)).all(-1) & (last != PADDING)
        # Other sequences mark a column behind the vocabulary.
        excluded = torch.zeros(scores.shape[0], vocabulary + 1, dtype=torch.bool, device=scores.device)
        excluded = excluded.scatter(1, last.where(completed, vocabulary), True)
        return scores.masked_fill(excluded[:, :vocabulary], -INF)


@dataclass(frozen=True, slots=True)
class DRY(HistoryProcessor):
    """Lowers the scores of tokens that would continue a repetition, by its length ("don't repeat yourself").

    If the last `m` tokens of the row, prompt included, are in it before, and `m` is at least `allowed_length`, the
    token that followed them there loses `multiplier * base ** (m - allowed_length)`; of several such places the one
    with the longest match counts, and of `m - allowed_length` at most 50. Published for text-generation-webui
    (github.com/oobabooga/text-generation-webui/pull/5677); llama.cpp has the same names with `dry_` before them.

    Args:
        multiplier: finite number above 0; 0.8 is recommended there.
        base: finite number of at least 1.
        allowed_length: matched tokens from which on a token is penalised.
        sequence_breakers: ids that end a match, and are not penalised, such as those of line breaks and quotes.

    Raises ArgumentError, with the name of the option, for other values.
    """

    multiplier: float
    base: float = 1.75
    allowed_length: int = 2
    sequence_breakers: Sequence[int] = ()

    def __post_init__(self) -> None:
        check_number("dry_multiplier", self.multiplier, above=0.0)
        if not is_finite(self.base) or self.base < 1:
            raise ArgumentError(f"dry_base: expected a finite number of at least 1, got {shown(self.base)}")
        check_count("dry_allowed_length", self.allowed_length)
        breakers: object = self.sequence_breakers
        if not isinstance(breakers, Sequence) or not all(map(is_id, breakers)):
            raise ArgumentError(f"dry_sequence_breakers: expected a list of ids (int) from 0 on, got {shown(breakers)}")

    def process(self, history: History, scores: Tensor) -> Tensor:
        tokens = history.marked()
        if tokens.shape[1] <= self.allowed_length:
            return scores
        breaks = torch.isin(tokens, on_device(self.sequence_breakers, tokens.device))
        longest = min(self.allowed_length + MOST_BEYOND, tokens.shape[1])
        # The `longest` tokens up to each column but the last, compared with those at the end, from right to left.
        end = tokens.masked_fill(breaks, NEVER)[:, -longest:]
        before = F.pad(tokens[:, :-1], (longest - 1, 0), value=PADDING).unfold(1, longest, 1)
        matched = (before == end.unsqueeze(1)).flip(-1).cumprod(-1).sum(-1)
        matched = matched.masked_fill(breaks[:, 1:], 0)
        # Before a token that is padding nothing has matched, so any id may take its 0.
        following = tokens[:, 1:].clamp(min=0)
        lengths = torch.zeros_like(scores, dtype=torch.int64).scatter_reduce(1, following, matched, "amax")
        powers = torch.pow(float(self.base), (lengths - self.allowed_length).to(scores.dtype))
        return lowered(scores, powers.where(lengths >= self.allowed_length, 0.0), self.multiplier)


def lowered(scores: Tensor, counts: Tensor, penalty: float) -> Tensor:
    """Scores [B, V] less `penalty` times `counts` [B, V], all finite; those of excluded tokens stay -inf."""
    most = torch.finfo(scores.dtype).max
    # Converted to float, because PyTorch refuses very large ints.
    penalty = float(min(max(penalty, -most), most))
    penalised = (scores - counts.clamp(max=most) * penalty).clamp(-most, most)
    return torch.where(scores.isfinite(), penalised, scores)


def _counts(history: History, scores: Tensor) -> Tensor:
    """How often each token was generated in its row: [B, V], of the dtype of the scores."""
    return torch.zeros_like(scores).scatter_add(1, history.tokens, history.is_new().to(scores.dtype))


def _check_penalty(name: str, penalty: object) -> None:
    if not is_finite(penalty):
        raise ArgumentError(f"{name}: expected a finite number, as a float or int, got {shown(penalty)}")
