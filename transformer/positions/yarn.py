"""YaRN: interpolates slow pairs only, and sharpens attention (arXiv 2309.00071)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigurationError, require_count, require_flag, require_number
from .scaling import RotaryScaling, pair_dimensions, plain_frequencies


@dataclass(frozen=True, init=False)
class YaRNScaling(RotaryScaling):
    """Leaves fast pairs as they are, divides slow ones by `factor`, and ramps between (YaRN, arXiv 2309.00071).

    Args:
        factor: how many times the original length the model shall reach, at least 1.
        original_length: the length that the model was first trained at.
        beta_fast: a pair that turns this often within `original_length` is the last that stays as it is.
        beta_slow: one that turns this often is the first that is divided by `factor`.
        attention_factor: by default `0.1 log(factor) + 1`, the paper's; fixed then, so `dataclasses.replace` keeps it.
        mscale, mscale_all_dim: where both are given the default is `m(mscale) / m(mscale_all_dim)` instead, with
            `m(s) = 0.1 s log(factor) + 1` (DeepSeek-V2, arXiv 2405.04434). Give None where a checkpoint has 0.
        truncate: whether the ends of the ramp are rounded outwards to whole pairs.

    Raises ConfigurationError for a `factor` below 1, numbers not above 0, a length that is not a whole number from 1,
    `beta_fast` below `beta_slow`; and for frequencies where the ramp would end before it begins.
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
        """The pair where slowing begins, and the one where it is whole."""
        begin, end = (self._pair_that_turns(beta, base, rotary_dim) for beta in (self.beta_fast, self.beta_slow))
        if self.truncate:
            begin, end = math.floor(begin), math.ceil(end)
        # The bounds of the authors' code: published models have them, though there is no pair `rotary_dim - 1`.
        begin, end = max(begin, 0.0), min(end, rotary_dim - 1.0)
        if end < begin:
            raise ConfigurationError(
                f"original_length: expected one in which some pair turns between beta_slow={self.beta_slow} and "
                f"beta_fast={self.beta_fast} times, got {self.original_length} with base={base} and "
                f"rotary_dim={rotary_dim}; use LinearScaling where all pairs are slow, none where all are fast"
            )
        return begin, end if end > begin else end + 0.001

    def _pair_that_turns(self, times: float, base: float, rotary_dim: int) -> float:
        """The pair, between whole ones too, that turns so many times within the original length."""
        return rotary_dim * math.log(self.original_length / (2.0 * math.pi * times)) / (2.0 * math.log(base))


def _sharpening(factor: float, scale: float) -> float:
    """The paper's square root of the inverse temperature, for scores of heads turned over `factor` times the length."""
    return 0.1 * scale * math.log(factor) + 1.0
