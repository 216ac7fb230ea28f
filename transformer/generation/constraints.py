"""Constraints of tokens: biases of sequences of ids, and a function that says which ids may follow."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ArgumentError, shown
from .history import History, HistoryProcessor
from .processors import are_ids, is_finite

INF = math.inf

SequenceBiases = Mapping[tuple[int, ...], float] | Sequence[tuple[Sequence[int], float]]
"""Biases of sequences of ids, by the sequence or as pairs."""

AllowedTokens = Callable[[int, Tensor], Iterable[int]]
"""Function `(number, ids [n])` of a row that gives the ids that may follow."""


@dataclass(frozen=True, slots=True)
class SequenceBias(HistoryProcessor):
    """Adds a bias to the score of a token that would complete a sequence of ids; -inf excludes the sequence.

    A sequence of one id is always biased. `sequence_bias` of transformers; `logit_bias` of OpenAI's API for sequences
    of one id.

    Args:
        biases: `{(id, ...): bias}`, or pairs `[[id, ...], bias]`. Of equal sequences the last one counts.

    Raises ArgumentError for an empty sequence, for an id that is not an int from 0 on or not in the vocabulary, and
    for a bias that is neither finite nor -inf.
    """

    biases: SequenceBiases
    _tails: tuple[tuple[Tensor, Tensor, Tensor], ...] = field(init=False, repr=False, compare=False)
    """For each length of sequences: the ids before the last [P, length - 1], the last ids [P], and the biases [P]."""
    _largest: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        groups: dict[int, dict[tuple[int, ...], float]] = {}
        for sequence, bias in _pairs(self.biases):
            groups.setdefault(len(sequence), {})[sequence] = bias
        tails = []
        for length, group in groups.items():
            ids = torch.tensor([*group], device="cpu").view(-1, length)
            tails.append((ids[:, :-1], ids[:, -1], torch.tensor([*group.values()], dtype=torch.float64, device="cpu")))
        object.__setattr__(self, "_tails", tuple(tails))
        object.__setattr__(self, "_largest", max((max(ids) for group in groups.values() for ids in group), default=0))

    def process(self, history: History, scores: Tensor) -> Tensor:
        if self._largest >= scores.shape[1]:
            raise ArgumentError(
                f"sequence_bias, bad_words_ids: expected ids below {scores.shape[1]}, the size of the vocabulary, "
                f"got {self._largest}"
            )
        tokens, most = history.marked(), torch.finfo(scores.dtype).max
        sums = torch.zeros_like(scores)
        for tail in self._tails:
            before, last, biases = (part.to(scores.device, non_blocking=True) for part in tail)
            start = tokens.shape[1] - before.shape[1]
            if start >= 0:
                completed = (tokens[:, start:].unsqueeze(1) == before).all(-1)
                within = biases.clamp(-most, most).where(biases.isfinite(), biases).to(scores.dtype)
                sums.index_add_(1, last, within.where(completed, 0.0))
        # A sum above 0 may have become infinite.
        return (scores + sums.clamp(max=most)).clamp(max=most)


@dataclass(frozen=True, slots=True)
class PrefixAllowedTokens(HistoryProcessor):
    """Excludes all tokens but those that a function allows after the tokens of a row.

    `prefix_allowed_tokens_fn` of transformers (arXiv 2010.00904). The host waits for the tokens of each step.

    Args:
        allowed: called for each row that goes on as `allowed(number, ids)` with its number, which beams have from their
            row, and its ids int64 [n] on the CPU, without padding; gives the ids that may follow.

    Raises ArgumentError where it gives no id, or ids that are not in the vocabulary.
    """

    allowed: AllowedTokens

    def __post_init__(self) -> None:
        if not callable(self.allowed):
            raise ArgumentError(f"prefix_allowed_tokens_fn: expected a function, got {shown(self.allowed)}")

    def process(self, history: History, scores: Tensor) -> Tensor:
        excluded = torch.ones(scores.shape, dtype=torch.bool, device="cpu")
        for row, tokens in history.row_tokens().items():
            answer: object = self.allowed(history.number(row), torch.tensor(tokens, device="cpu"))
            given = [int(token) for token in answer] if isinstance(answer, Iterable) else []
            if not given or min(given) < 0 or max(given) >= scores.shape[1]:
                raise ArgumentError(
                    f"prefix_allowed_tokens_fn: expected at least one id from 0 on and below {scores.shape[1]} for row "
                    f"{row}, got {shown(answer)}"
                )
            excluded[row, given] = False
        return scores.masked_fill(excluded.to(scores.device, non_blocking=True), -INF)


def _pairs(biases: object) -> list[tuple[tuple[int, ...], float]]:
    """The sequences and their biases. Raises ArgumentError for others than `SequenceBiases`."""
    pairs = list(biases.items()) if isinstance(biases, Mapping) else biases
    expected = "sequence_bias: expected {(id, ...): bias} or pairs [[id, ...], bias], of ids (int) from 0 on and a bias"
    if not isinstance(pairs, Sequence):
        raise ArgumentError(f"{expected}, got {shown(biases)}")
    found = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not are_ids(pair[0]) or not _is_bias(pair[1]):
            raise ArgumentError(f"{expected} that is finite or -inf, got {shown(pair)}")
        found.append((tuple(pair[0]), float(pair[1])))
    return found


def _is_bias(value: object) -> bool:
    return is_finite(value) or (isinstance(value, float) and value == -INF)
