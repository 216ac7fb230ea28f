"""What may be done to logits before a token is taken: plain callables, to which a user can add.

Each takes logits [B, V] and the tokens of each row so far, int64 [B, n] with `NOTHING` at padding, and gives logits
[B, V]. A token that must not be taken gets -inf.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError

Processor = Callable[[Tensor, Tensor], Tensor]

INF = math.inf


@dataclass(frozen=True, slots=True)
class RepetitionPenalty:
    """Makes tokens less likely that the row holds already (CTRL, arXiv 1909.05858).

    Logits above 0 are divided by `penalty`, others multiplied.
    """

    penalty: float

    def __post_init__(self) -> None:
        check_number("repetition_penalty", self.penalty, above=0.0)

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        held = torch.zeros_like(logits).scatter_reduce(1, tokens.clamp(min=0), (tokens >= 0).to(logits.dtype), "amax")
        penalty, most = _within(self.penalty, logits), torch.finfo(logits.dtype).max
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty).clamp(-most, most)
        return torch.where((held > 0) & logits.isfinite(), penalised, logits)


@dataclass(frozen=True, slots=True)
class Temperature:
    """Divides logits by `temperature`: below 1 the likely gets likelier, above 1 all get more alike."""

    temperature: float

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0.0)

    def __call__(self, logits: Tensor, _: Tensor) -> Tensor:
        # The likeliest at 0: however small the temperature, it stays finite.
        return (logits - logits.amax(-1, keepdim=True)) / _within(self.temperature, logits)


@dataclass(frozen=True, slots=True)
class TopK:
    """Keeps the `k` likeliest tokens, and those as likely as the last of them; all where there are no more."""

    k: int

    def __post_init__(self) -> None:
        if type(self.k) is not int or self.k < 1:
            raise ArgumentError(f"top_k: expected a whole number of at least 1, got {self.k!r}")

    def __call__(self, logits: Tensor, _: Tensor) -> Tensor:
        least = logits.topk(min(self.k, logits.shape[-1])).values[:, -1:]
        return logits.masked_fill(logits < least, -INF)


@dataclass(frozen=True, slots=True)
class TopP:
    """Keeps the likeliest tokens whose probabilities first sum to `p` or more (nucleus sampling, arXiv 1904.09751)."""

    p: float

    def __post_init__(self) -> None:
        check_number("top_p", self.p, above=0.0, most=1.0)

    def __call__(self, logits: Tensor, _: Tensor) -> Tensor:
        ordered, order = logits.sort(descending=True, stable=True)
        probability = ordered.softmax(-1)
        # What stands before a token in this order decides; the likeliest has nothing before it, and stays.
        before = probability.cumsum(-1) - probability
        beyond = before >= _within(self.p, logits)
        return logits.masked_fill(beyond.scatter(1, order, beyond), -INF)


@dataclass(frozen=True, slots=True)
class MinP:
    """Keeps tokens at least `p` times as likely as the likeliest (arXiv 2407.01082)."""

    p: float

    def __post_init__(self) -> None:
        check_number("min_p", self.p, above=0.0, most=1.0)

    def __call__(self, logits: Tensor, _: Tensor) -> Tensor:
        return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(self.p), -INF)


def _within(value: float, logits: Tensor) -> float:
    """The nearest number to `value` above 0 that the dtype of the logits can tell from 0 and from infinity."""
    info = torch.finfo(logits.dtype)
    return min(max(value, info.tiny), info.max)


def check_number(name: str, value: object, *, above: float, most: float = INF) -> None:
    """Raises ArgumentError unless `value` is a finite number above one bound and at most another."""
    if not is_finite(value) or not above < value <= most:  # type: ignore[operator]
        bounds = f"above {above:g}" + ("" if most == INF else f" and at most {most:g}")
        raise ArgumentError(f"{name}: expected a finite number {bounds}, got {value!r}")


def is_finite(value: object) -> bool:
    """Whether it is a number, and neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
