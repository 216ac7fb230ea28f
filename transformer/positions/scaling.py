"""Rules that stretch rotary frequencies beyond the length that a model was trained at.

Here the interface, and the rules that scale frequencies alone; `yarn.py` and `longrope.py` also scale attention.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigurationError, require_count, require_number


def plain_frequencies(base: float, rotary_dim: int) -> Tensor:
    """Radians per position of each pair, `base ** (-2 i / rotary_dim)`: float64 [rotary_dim / 2] on the CPU."""
    return base ** (-pair_dimensions(rotary_dim) / rotary_dim)


def pair_dimensions(rotary_dim: int) -> Tensor:
    """`2 i` of each pair `i`: float64 [rotary_dim / 2] on the CPU."""
    return torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu")


class RotaryScaling(ABC):
    """What a `RotaryEmbedding` turns its pairs by instead of the plain frequencies.

    Everything is fixed at construction, the length included where a rule depends on one, so that the frequencies never
    change during a conversation.
    """

    @abstractmethod
    def frequencies(self, base: float, rotary_dim: int) -> Tensor:
        """Radians per position of each pair: float64 [rotary_dim / 2] on the CPU.

        Raises ConfigurationError where the rule has none for this `base` or `rotary_dim`.
        """

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by, and so the scores by its square."""
        return 1.0


@dataclass(frozen=True)
class LinearScaling(RotaryScaling):
    """Position interpolation (arXiv 2306.15595): every frequency divided by `factor`, at least 1.

    Raises ConfigurationError for a `factor` that is not such a number.
    """

    factor: float

    def __post_init__(self) -> None:
        require_number("factor", self.factor, least=1.0)

    def frequencies(self, base: float, rotary_dim: int) -> Tensor:
        return plain_frequencies(base, rotary_dim) / self.factor


@dataclass(frozen=True)
class DynamicNTKScaling(RotaryScaling):
    """NTK-aware scaling by the length (bloc97 and emozilla; sections 3.1 and 3.3 of YaRN, arXiv 2309.00071).

    The base grows by `g ** (d / (d - 2))`, with `g = factor * length / original_length - (factor - 1)` and `d` the
    rotary_dim: the fastest pair stays as it is, the slowest is divided by `g`. `length` is the longest that a
    conversation may get; up to `original_length` it changes nothing.

    Raises ConfigurationError for a `factor` or a length below 1, and for the frequencies of a single pair.
    """

    factor: float
    original_length: int
    length: int

    def __post_init__(self) -> None:
        require_number("factor", self.factor, least=1.0)
        require_count("original_length", self.original_length)
        require_count("length", self.length)

    def frequencies(self, base: float, rotary_dim: int) -> Tensor:
        if rotary_dim < 4:
            raise ConfigurationError(
                f"rotary_dim: expected at least 4 with DynamicNTKScaling, which stretches from the first pair to the "
                f"last, got {rotary_dim}; give more dimensions or LinearScaling"
            )
        # Written so that it is exactly 1 at the original length.
        growth = 1.0 + self.factor * (max(self.length / self.original_length, 1.0) - 1.0)
        # Pair by pair, since the grown base itself may be too large for a float.
        return plain_frequencies(base, rotary_dim) * growth ** (-pair_dimensions(rotary_dim) / (rotary_dim - 2))


@dataclass(frozen=True)
class Llama3Scaling(RotaryScaling):
    """The rule of Llama 3.1 (model card of meta-llama/Llama-3.1-8B, and its reference code).

    A pair that turns more than `high_freq_factor` times within `original_length` stays as it is, one that turns less
    than `low_freq_factor` times is divided by `factor`, and those between change over linearly in their turns.

    Raises ConfigurationError for a `factor` or length below 1, other factors not above 0, or low not below high.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def __post_init__(self) -> None:
        require_number("factor", self.factor, least=1.0)
        require_number("low_freq_factor", self.low_freq_factor, above=0.0)
        require_number("high_freq_factor", self.high_freq_factor, above=0.0)
        require_count("original_length", self.original_length)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigurationError(
                f"low_freq_factor: expected below high_freq_factor={self.high_freq_factor}, got {self.low_freq_factor}"
            )

    def frequencies(self, base: float, rotary_dim: int) -> Tensor:
        plain = plain_frequencies(base, rotary_dim)
        turns = plain * self.original_length / (2.0 * math.pi)
        stays = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(plain / self.factor, plain, stays.clamp(0.0, 1.0))
