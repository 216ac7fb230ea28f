"""LongRoPE: one scaling factor per rotary pair (arXiv 2402.13753)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigurationError, require_count, require_number, shown
from .scaling import RotaryScaling, plain_frequencies


@dataclass(frozen=True, init=False)
class LongRoPEScaling(RotaryScaling):
    """LongRoPE (arXiv 2402.13753; used by Phi-3): divides the frequency of each pair by a factor of its own.

    Args:
        short_factor: one factor per pair, used if `length` is at most `original_length`.
        long_factor: one factor per pair, used if `length` is greater.
        original_length: the length at which the model was pretrained.
        length: the maximum length of a conversation.
        factor: the model's maximum length divided by `original_length`; default `length / original_length`. Give it if
            `length` is not the model's maximum, because the attention factor belongs to the model, not to `length`.
        attention_factor: default `sqrt(1 + log(factor) / log(original_length))`, and 1 for a `factor` up to 1. It is
            fixed at construction, so `dataclasses.replace` keeps it.

    Raises ConfigurationError for numbers that are not above 0, lengths that are not whole numbers from 1, an original
    length of 1 without an `attention_factor`, and, when frequencies are computed, for a list that does not fit
    rotary_dim.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int
    length: int
    factor: float
    attention_factor: float = 1.0

    def __init__(
        self,
        short_factor: Sequence[float],
        long_factor: Sequence[float],
        original_length: int,
        length: int,
        *,
        factor: float | None = None,
        attention_factor: float | None = None,
    ) -> None:
        require_count("original_length", original_length)
        require_count("length", length)
        if factor is None:
            factor = length / original_length
        require_number("factor", factor, above=0.0)
        if attention_factor is None:
            attention_factor = _attention_factor(factor, original_length)
        require_number("attention_factor", attention_factor, above=0.0)
        fields = {
            "short_factor": _checked("short_factor", short_factor),
            "long_factor": _checked("long_factor", long_factor),
            "original_length": original_length,
            "length": length,
            "factor": factor,
            "attention_factor": attention_factor,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def frequencies(self, base: float, rotary_dim: int) -> Tensor:
        for name, factors in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if len(factors) != rotary_dim // 2:
                raise ConfigurationError(
                    f"{name}: expected {rotary_dim // 2} numbers, one per pair of rotary_dim={rotary_dim}, "
                    f"got {len(factors)}"
                )
        factors = self.long_factor if self.length > self.original_length else self.short_factor
        return plain_frequencies(base, rotary_dim) / torch.tensor(factors, dtype=torch.float64, device="cpu")


def _checked(name: str, factors: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(factors, Sequence):
        raise ConfigurationError(f"{name}: expected a list of numbers, one per pair, got {shown(factors)}")
    for factor in factors:
        require_number(name, factor, above=0.0)
    return tuple(factors)


def _attention_factor(factor: float, original_length: int) -> float:
    if factor <= 1.0:
        return 1.0
    if original_length == 1:
        raise ConfigurationError("original_length: expected at least 2, got 1; or give attention_factor")
    return math.sqrt(1.0 + math.log(factor) / math.log(original_length))
