"""Processors of scores before a token is taken: plain callables, to which a user can add.

Each is called as `processor(input_ids, scores)`, as transformers' `LogitsProcessor` is: the tokens of each row so far,
int64 [B, n], and scores [B, V], float32 or float64; it gives scores [B, V]. A token that must not be taken gets -inf.
Where rows differ in length, the first token of a row stands at its padding as well: ids are always in the vocabulary,
and a row holds no token that is not its own.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, DeviceError, DtypeError, ShapeError

Processor = Callable[[Tensor, Tensor], Tensor]

INF = math.inf


@dataclass(frozen=True, slots=True)
class RepetitionPenalty:
    """Makes tokens less likely that the row holds already (CTRL, arXiv 1909.05858).

    Scores above 0 are divided by `penalty`, others multiplied.

    Raises ArgumentError for a `penalty` that is not a finite number above 0.
    """

    penalty: float

    def __post_init__(self) -> None:
        check_number("repetition_penalty", self.penalty, above=0.0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        held = torch.zeros_like(scores, dtype=torch.bool).scatter(1, input_ids, True)
        penalty, most = _within(self.penalty, scores), torch.finfo(scores.dtype).max
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty).clamp(-most, most)
        return torch.where(held & scores.isfinite(), penalised, scores)


@dataclass(frozen=True, slots=True)
class Temperature:
    """Divides scores by `temperature`: below 1 the likely gets likelier, above 1 all get more alike.

    Raises ArgumentError for a `temperature` that is not a finite number above 0.
    """

    temperature: float

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0.0)

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        # The likeliest at 0: however small the temperature, it stays finite.
        return (scores - scores.amax(-1, keepdim=True)) / _within(self.temperature, scores)


@dataclass(frozen=True, slots=True)
class TopK:
    """Keeps the `k` likeliest tokens, and those as likely as the last of them; all where there are no more.

    Raises ArgumentError for a `k` that is not a whole number from 1.
    """

    k: int

    def __post_init__(self) -> None:
        if type(self.k) is not int or self.k < 1:
            raise ArgumentError(f"top_k: expected a whole number (int) of at least 1, got {shown(self.k)}")

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        least = scores.topk(min(self.k, scores.shape[-1])).values[:, -1:]
        return scores.masked_fill(scores < least, -INF)


@dataclass(frozen=True, slots=True)
class TopP:
    """Keeps the likeliest tokens whose probabilities first sum to `p` or more (nucleus sampling, arXiv 1904.09751).

    1 keeps all.

    Raises ArgumentError for a `p` that is not above 0 and at most 1.
    """

    p: float

    def __post_init__(self) -> None:
        check_number("top_p", self.p, above=0.0, most=1.0)

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        if self.p == 1:
            # The sum may round to 1 before the last token.
            return scores
        ordered, order = scores.sort(descending=True, stable=True)
        # What stands before a token in this order decides; the likeliest has nothing before it, and stays. Summed
        # without the token, not subtracted again: 0.5 + 0.3 is 0.8, but 0.9 - 0.1 need not be.
        before = F.pad(ordered.softmax(-1).cumsum(-1)[:, :-1], (1, 0))
        beyond = before >= _within(self.p, scores)
        return scores.masked_fill(beyond.scatter(1, order, beyond), -INF)


@dataclass(frozen=True, slots=True)
class MinP:
    """Keeps tokens at least `p` times as likely as the likeliest (arXiv 2407.01082).

    Raises ArgumentError for a `p` that is not above 0 and at most 1.
    """

    p: float

    def __post_init__(self) -> None:
        check_number("min_p", self.p, above=0.0, most=1.0)

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        probability = scores.softmax(-1)
        least = probability.amax(-1, keepdim=True) * _within(self.p, scores)
        return scores.masked_fill(probability < least, -INF)


def processed(chain: Iterable[Processor], input_ids: Tensor, scores: Tensor) -> Tensor:
    """The scores [B, V] after every processor, in order.

    Raises ArgumentError, ShapeError, DtypeError or DeviceError, naming the processor, where one gives anything else
    than float scores [B, V] on the same device.
    """
    for processor in chain:
        given = processor(input_ids, scores)
        _check_scores(processor, given, scores)
        scores = given.to(scores.dtype)
    return scores


def tokens_so_far(prompt: Tensor, real: Tensor | None) -> Tensor:
    """A copy of the prompt int64 [B, L], padded on the left where not `real`, as processors are given it."""
    if real is None:
        return prompt.clone()
    first = real.to(torch.uint8).argmax(-1, keepdim=True)
    return prompt.where(real, prompt.take_along_dim(first, 1))


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
    """The nearest number to `value` above 0 that the dtype of the scores can tell from 0 and from infinity."""
    info = torch.finfo(scores.dtype)
    # An int as it is could be too large for PyTorch.
    return float(min(max(value, info.tiny), info.max))


def check_number(name: str, value: object, *, above: float, most: float = INF, or_zero: bool = False) -> None:
    """Raises ArgumentError unless `value` is a finite number above one bound and at most another, or 0 where it may."""
    if or_zero and is_finite(value) and value == 0:
        return
    if not is_finite(value) or not above < value <= most:  # type: ignore[operator]
        bounds = f"above {above:g}" + ("" if most == INF else f" and at most {most:g}")
        bounds += ", or 0" if or_zero else ""
        raise ArgumentError(f"{name}: expected a finite number {bounds}, as a float or int, got {shown(value)}")


def is_finite(value: object) -> bool:
    """Whether it is a number, and neither NaN nor infinite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        # An int that no float can hold.
        return False


def shown(value: object) -> str:
    """The value as an error shows it, however long it is."""
    try:
        text = repr(value)
    except ValueError:
        # Python writes no ints of more than some thousands of digits.
        return f"a {type(value).__name__} of more digits than can be shown"
    return text if len(text) <= 200 else f"{text[:200]}..."
