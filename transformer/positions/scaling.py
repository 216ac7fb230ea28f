"""Scalings of rotary frequencies for lengths beyond the pretraining length of a model.

This file has the interface and the scalings that change frequencies only; those of `yarn.py` and `longrope.py` also
scale attention scores.
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
    """Interface of a scaling: the frequencies that replace the plain ones of a `RotaryEmbedding`.

    All values are fixed at construction, also the length of a scaling that depends on a length, so that frequencies
    never change during a conversation.
    """

    @abstractmethod
    def frequencies(self, base: float, rotary_dim: int) -> Tensor:
        """Radians per position of each pair: float64 [rotary_dim / 2] on the CPU.

        Raises ConfigurationError if the scaling has no frequencies for this `base` or `rotary_dim`.
        """

    @property
    def attention_factor(self) -> float:
        """Factor of cosines and sines; scores are therefore multiplied by its square."""
        return 1.0


@dataclass(frozen=True)
class LinearScaling(RotaryScaling):
    """Position interpolation (arXiv 2306.15595): divides each frequency by `factor`.

    Raises ConfigurationError for a `factor` that is not a number of at least 1.
    """

    factor: float

    def __post_init__(self) -> None:
        require_number("factor", self.factor, least=1.0)

    def frequencies(self, base: float, rotary_dim: int) -> Tensor:
        return plain_frequencies(base, rotary_dim) / self.factor


@dataclass(frozen=True)
class DynamicNTKScaling(RotaryScaling):
    """NTK-aware scaling by length (bloc97 and emozilla; sections 3.1 and 3.3 of YaRN, arXiv 2309.00071).

    The base is multiplied by `g ** (d / (d - 2))`, with `g = factor * length / original_length - (factor - 1)` and `d`
    the rotary_dim: the fastest pair keeps its frequency, the frequency of the slowest is divided by `g`. `length` is
    the maximum length of a conversation; a `length` up to `original_length` changes nothing.

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
                f"rotary_dim: expected at least 4 with DynamicNTKScaling, which needs a first and a last pair, "
                f"got {rotary_dim}; give more dimensions or LinearScaling"
            )
        # Written so that it is exactly 1 at the original length.
        growth = 1.0 + self.factor * (max(self.length / self.original_length, 1.0) - 1.0)
        # The factor is applied to each frequency, because the scaled base could exceed the range of a float.
        return plain_frequencies(base, rotary_dim) * growth ** (-pair_dimensions(rotary_dim) / (rotary_dim - 2))


@dataclass(frozen=True)
class Llama3Scaling(RotaryScaling):
    """Scaling of Llama 3.1 (model card of meta-llama/Llama-3.1-8B, and its reference code).

    A pair with more than `high_freq_factor` turns within `original_length` keeps its frequency. The frequency of a pair
    with fewer than `low_freq_factor` turns is divided by `factor`. Between them it is interpolated linearly.

    Raises ConfigurationError for a `factor` or length below 1, for another factor that is not above 0, and for a
    `low_freq_factor` that is not below `high_freq_factor`.
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
        unscaled = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(plain / self.factor, plain, unscaled.clamp(0.0, 1.0))
