"""Processors of the scores from which a token is chosen: plain callables, also the user's own.

A processor is called as `processor(input_ids, scores)`, like transformers' `LogitsProcessor`, with the tokens of each
row so far, int64 [B, n], and scores [B, V], float32 or float64; it gives scores [B, V]. The score of an excluded token
is -inf. At padding and after the end of a row, `input_ids` has the first token of the row, so that it contains no id
that is not in the row. A `HistoryProcessor` also gets the beginnings of rows and of their new tokens.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, DeviceError, DtypeError, ShapeError, shown
from ..tracing import is_traced
from .history import History, HistoryProcessor

Processor = Callable[[Tensor, Tensor], Tensor]

INF = math.inf

LARGE_VOCABULARY = 4096
"""Tokens from which on nucleus sampling sorts those alone that can be kept, where most cannot: of 49,152 it takes 0.3
instead of 10 ms (one thread, 2026-11-28)."""


@dataclass(frozen=True, slots=True)
class RepetitionPenalty:
    """Lowers the scores of tokens that are in the row (CTRL, arXiv 1909.05858).

    Scores above 0 are divided by `penalty`, other scores are multiplied by it.

    Raises ArgumentError for a `penalty` that is not a finite number above 0.
    """

    penalty: float

    def __post_init__(self) -> None:
        check_number("repetition_penalty", self.penalty, above=0.0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        in_row = torch.zeros_like(scores, dtype=torch.bool).scatter(1, input_ids, True)
        penalty, most = _within(self.penalty, scores), torch.finfo(scores.dtype).max
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty).clamp(-most, most)
        return torch.where(in_row & scores.isfinite(), penalised, scores)


@dataclass(frozen=True, slots=True)
class Temperature:
    """Divides scores by `temperature`: a value below 1 sharpens the distribution, a value above 1 flattens it.

    Raises ArgumentError for a `temperature` that is not a finite number above 0.
    """

    temperature: float

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0.0)

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        # The maximum is moved to 0, so that it stays finite for any temperature.
        return (scores - scores.amax(-1, keepdim=True)) / _within(self.temperature, scores)


@dataclass(frozen=True, slots=True)
class TopK:
    """Keeps the `k` most probable tokens, and all tokens with the same score as the last of them.

    Raises ArgumentError for a `k` that is not a whole number from 1.
    """

    k: int

    def __post_init__(self) -> None:
        check_count("top_k", self.k)

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        least = scores.topk(min(self.k, scores.shape[-1])).values[:, -1:]
        return scores.masked_fill(scores < least, -INF)


@dataclass(frozen=True, slots=True)
class TopP:
    """Nucleus sampling (arXiv 1904.09751): keeps the most probable tokens until their probabilities sum to `p`.

    1 keeps all tokens.

    Raises ArgumentError for a `p` that is not above 0 and at most 1.
    """

    p: float

    def __post_init__(self) -> None:
        check_number("top_p", self.p, above=0.0, most=1.0)

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        if self.p == 1:
            # A rounded sum can reach 1 before the last token.
            return scores
        if scores.is_cpu and scores.shape[-1] >= LARGE_VOCABULARY and not is_traced(scores):
            return torch.stack([self._of_few(row) for row in scores])
        return self._of_all(scores)

    def _of_all(self, scores: Tensor) -> Tensor:
        ordered, order = scores.sort(descending=True, stable=True)
        # The sum of the probabilities before a token decides, so the most probable token always stays. It is summed
        # without the token: a subtraction of the token from the sum could round differently.
        before = F.pad(ordered.softmax(-1).cumsum(-1)[:, :-1], (1, 0))
        beyond = before >= _within(self.p, scores)
        return scores.masked_fill(beyond.scatter(1, order, beyond), -INF)

    def _of_few(self, scores: Tensor) -> Tensor:
        """The same of one row [V], of which only the tokens are sorted that can be kept."""
        p, vocabulary = _within(self.p, scores), scores.shape[-1]
        probabilities = scores.softmax(-1)
        # All tokens below this bound together have at most half of what is cut off.
        possible = probabilities > (1.0 - p) / (2 * vocabulary)
        if 2 * int(possible.sum()) > vocabulary:
            return self._of_all(scores.unsqueeze(0)).squeeze(0)
        index = possible.nonzero().squeeze(-1)
        ordered, order = probabilities[index].sort(descending=True, stable=True)
        before = F.pad(ordered.cumsum(-1)[:-1], (1, 0))
        kept = index[order[before < p]]
        return torch.full_like(scores, -INF).index_copy_(0, kept, scores[kept])


@dataclass(frozen=True, slots=True)
class MinP:
    """Keeps tokens with at least `p` times the probability of the most probable token (arXiv 2407.01082).

    Raises ArgumentError for a `p` that is not above 0 and at most 1.
    """

    p: float

    def __post_init__(self) -> None:
        check_number("min_p", self.p, above=0.0, most=1.0)

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        probability = scores.softmax(-1)
        least = probability.amax(-1, keepdim=True) * _within(self.p, scores)
        return scores.masked_fill(probability < least, -INF)


def processed(chain: Iterable[Processor], history: History, scores: Tensor) -> Tensor:
    """The scores [B, V] after all processors, in order.

    Raises ArgumentError, ShapeError, DtypeError or DeviceError, with the name of the processor, for a result other
    than float scores [B, V] on the same device.
    """
    for processor in chain:
        if isinstance(processor, HistoryProcessor):
            given = processor.process(history, scores)
        else:
            given = processor(history.tokens, scores)
        _check_scores(processor, given, scores)
        scores = given.to(scores.dtype)
    return scores


def _check_scores(processor: Processor, given: object, scores: Tensor) -> None:
    name = getattr(processor, "__name__", type(processor).__name__)
    expected = f"processors: {name}: expected float scores {list(scores.shape)} from processor(input_ids, scores)"
    if not isinstance(given, Tensor):
        raise ArgumentError(f"{expected}, got {type(given).__name__}")
    if given.layout is not torch.strided:
        raise ArgumentError(f"{expected}, got a tensor of layout {given.layout}; give its to_dense()")
    if given.shape != scores.shape:
        raise ShapeError(f"{expected}, got {list(given.shape)}")
    if not given.is_floating_point():
        raise DtypeError(f"{expected}, got {given.dtype}")
    if given.device != scores.device:
        raise DeviceError(f"{expected} on {scores.device}, got {given.device}")


def _within(value: float, scores: Tensor) -> float:
    """`value` above 0, clamped to the positive finite numbers of the dtype of the scores."""
    info = torch.finfo(scores.dtype)
    # Converted to float, because PyTorch refuses very large ints.
    return float(min(max(value, info.tiny), info.max))


def check_number(name: str, value: object, *, above: float, most: float = INF, or_zero: bool = False) -> None:
    """Raises ArgumentError unless `value` is a finite number above `above` and at most `most`, or 0 with `or_zero`."""
    if or_zero and is_finite(value) and value == 0:
        return
    if not is_finite(value) or not above < value <= most:  # type: ignore[operator]
        bounds = f"above {above:g}" + ("" if most == INF else f" and at most {most:g}")
        bounds += ", or 0" if or_zero else ""
        raise ArgumentError(f"{name}: expected a finite number {bounds}, as a float or int, got {shown(value)}")


def check_count(name: str, value: object) -> None:
    """Raises ArgumentError unless `value` is a whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise ArgumentError(f"{name}: expected a whole number (int) of at least 1, got {shown(value)}")


def is_finite(value: object) -> bool:
    """True for an int or float that is neither NaN nor infinite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        # An int beyond the range of float.
        return False


def are_ids(sequence: object) -> bool:
    """True for a sequence of at least one token id."""
    return isinstance(sequence, Sequence) and len(sequence) > 0 and all(map(is_id, sequence))


def is_id(token: object) -> bool:
    """True for an int that can be a token id, within the range of int64."""
    return type(token) is int and 0 <= token < 2**63
