"""YaRN scaling of rotary frequencies: interpolation of slow pairs, and an attention temperature (arXiv 2309.00071)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigurationError, require_count, require_flag, require_number
from .scaling import RotaryScaling, pair_dimensions, plain_frequencies


@dataclass(frozen=True, init=False)
class YaRNScaling(RotaryScaling):
    """YaRN (arXiv 2309.00071): keeps fast pairs, divides the frequency of slow pairs by `factor`, interpolates between.

    Args:
        factor: the new maximum length divided by `original_length`, at least 1.
        original_length: the length at which the model was pretrained.
        beta_fast: a pair with this many turns within `original_length` is the slowest that keeps its frequency.
        beta_slow: a pair with this many turns is the fastest whose frequency is divided by `factor`.
        attention_factor: default `0.1 log(factor) + 1`, as in the paper. It is fixed at construction, so
            `dataclasses.replace` keeps it.
        mscale, mscale_all_dim: if both are given the default is `m(mscale) / m(mscale_all_dim)` instead, with
            `m(s) = 0.1 s log(factor) + 1` (DeepSeek-V2, arXiv 2405.04434). Give None for a 0 in a checkpoint.
        truncate: True rounds the ends of the ramp outwards to whole pairs.

    Raises ConfigurationError for a `factor` below 1, a number that is not above 0, a length that is not a whole number
    from 1, a `beta_fast` below `beta_slow`, and, when frequencies are computed, for a ramp that ends before it begins.
    """

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    attention_factor: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __init__(
        self,
        factor: float,
        original_length: int,
        *,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float | None = None,
        mscale: float | None = None,
        mscale_all_dim: float | None = None,
        truncate: bool = True,
    ) -> None:
        require_number("factor", factor, least=1.0)
        require_count("original_length", original_length)
        require_number("beta_slow", beta_slow, above=0.0)
        require_number("beta_fast", beta_fast, above=0.0)
        for name, turns in (("beta_slow", beta_slow), ("beta_fast", beta_fast)):
            if not 1e-9 < turns < 1e9:
                raise ConfigurationError(f"{name}: expected a number of turns between 1e-9 and 1e9, got {turns}")
        if beta_fast < beta_slow:
            raise ConfigurationError(f"beta_fast: expected at least beta_slow={beta_slow}, got {beta_fast}")
        for name, given in (("mscale", mscale), ("mscale_all_dim", mscale_all_dim)):
            if given is not None:
                require_number(name, given, above=0.0)
        require_flag("truncate", truncate)
        if attention_factor is None:
            attention_factor = _sharpening(factor, 1.0)
            if mscale is not None and mscale_all_dim is not None:
                attention_factor = _sharpening(factor, mscale) / _sharpening(factor, mscale_all_dim)
        require_number("attention_factor", attention_factor, above=0.0)
        fields = {
            "factor": factor,
            "original_length": original_length,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "attention_factor": attention_factor,
            "mscale": mscale,
            "mscale_all_dim": mscale_all_dim,
            "truncate": truncate,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def frequencies(self, base: float, rotary_dim: int) -> Tensor:
        if base <= 1.0:
            raise ConfigurationError(f"base: expected above 1 with YaRNScaling, got {base}; pairs would not slow down")
        plain = plain_frequencies(base, rotary_dim)
        begin, end = self._ramp(base, rotary_dim)
        slow = ((pair_dimensions(rotary_dim) / 2.0 - begin) / (end - begin)).clamp(0.0, 1.0)
        return torch.lerp(plain, plain / self.factor, slow)

    def _ramp(self, base: float, rotary_dim: int) -> tuple[float, float]:
        """The pairs where the ramp begins and ends."""
        begin, end = (self._pair_that_turns(beta, base, rotary_dim) for beta in (self.beta_fast, self.beta_slow))
        if self.truncate:
            begin, end = math.floor(begin), math.ceil(end)
        # The bounds of the authors' code, which published models rely on, although there is no pair `rotary_dim - 1`.
        begin, end = max(begin, 0.0), min(end, rotary_dim - 1.0)
        if end < begin:
            raise ConfigurationError(
                f"original_length: expected a length in which some pair turns between beta_slow={self.beta_slow} and "
                f"beta_fast={self.beta_fast} times, got {self.original_length} with base={base} and "
                f"rotary_dim={rotary_dim}; use LinearScaling if all pairs are slow, no scaling if all are fast"
            )
        return begin, end if end > begin else end + 0.001

    def _pair_that_turns(self, times: float, base: float, rotary_dim: int) -> float:
        """Index, as a real number, of the pair with so many turns within `original_length`."""
        return rotary_dim * math.log(self.original_length / (2.0 * math.pi * times)) / (2.0 * math.log(base))


def _sharpening(factor: float, scale: float) -> float:
    """Square root of the paper's inverse attention temperature, for a length `factor` times the original one."""
    return 0.1 * scale * math.log(factor) + 1.0
