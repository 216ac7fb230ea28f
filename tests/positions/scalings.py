"""Rotary scalings in three forms: ours, a transformers config, and a plain Python formula for one pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from transformer.positions import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    RotaryScaling,
    YaRNScaling,
)


class Case(NamedTuple):
    """One scaling, for heads of which `dim` dimensions turn, in three tellings."""

    ours: Callable[[int], RotaryScaling]
    theirs: Callable[[int], dict]
    """`rope_parameters` of a transformers config."""
    plain: Callable[[int, float, int], float]
    """The frequency of pair i, from (i, base, dim)."""
    attention: float
    original: int
    length: int


def linear(factor: float) -> Case:
    return Case(
        lambda dim: LinearScaling(factor),
        lambda dim: {"rope_type": "linear", "factor": factor},
        lambda i, base, dim: 1 / (factor * base ** (2 * i / dim)),
        1.0, 32, 64,
    )  # fmt: skip


def dynamic(factor: float, original: int, length: int) -> Case:
    def plain(i: int, base: float, dim: int) -> float:
        ratio = max(length, original) / original
        grown = base * (factor * ratio - (factor - 1)) ** (dim / (dim - 2))
        return grown ** (-2 * i / dim)

    return Case(
        lambda dim: DynamicNTKScaling(factor, original, length),
        lambda dim: {"rope_type": "dynamic", "factor": factor},
        plain, 1.0, original, length,
    )  # fmt: skip


def llama3(factor: float, low: float, high: float, original: int) -> Case:
    def plain(i: int, base: float, dim: int) -> float:
        frequency = base ** (-2 * i / dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            return frequency
        if wavelength > original / low:
            return frequency / factor
        smooth = (original / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency

    parameters = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return Case(
        lambda dim: Llama3Scaling(factor, low, high, original),
        lambda dim: {"rope_type": "llama3", "original_max_position_embeddings": original, **parameters},
        plain, 1.0, original, original * 2,
    )  # fmt: skip


def yarn(factor: float, original: int, attention: float, **options: float) -> Case:
    def plain(i: int, base: float, dim: int) -> float:
        ends = [
            dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (options.get("beta_fast", 32), options.get("beta_slow", 1))
        ]
        if options.get("truncate", True):
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        first, last = max(ends[0], 0), min(ends[1], dim - 1)
        # The authors widen a ramp of no width by so much.
        share = min(max((i - first) / (last - first or 0.001), 0), 1)
        frequency = base ** (-2 * i / dim)
        return share * frequency / factor + (1 - share) * frequency

    parameters = {"factor": factor, "original_max_position_embeddings": original, **options}
    return Case(
        lambda dim: YaRNScaling(factor, original, **options),
        lambda dim: {"rope_type": "yarn", **parameters},
        plain, attention, original, original * 2,
    )  # fmt: skip


def longrope(original: int, length: int, attention: float, **options: float) -> Case:
    def short(dim: int) -> list[float]:
        return [1 + 0.01 * i for i in range(dim // 2)]

    def long(dim: int) -> list[float]:
        return [1.5 + i * i / 7 for i in range(dim // 2)]

    def parameters(dim: int) -> dict:
        lists = {"short_factor": short(dim), "long_factor": long(dim)}
        factor = options.get("factor", length / original)
        return {**lists, "original_max_position_embeddings": original, **options, "factor": factor}

    return Case(
        lambda dim: LongRoPEScaling(short(dim), long(dim), original, length, **options),
        lambda dim: {"rope_type": "longrope", **parameters(dim)},
        lambda i, base, dim: base ** (-2 * i / dim) / (long if length > original else short)(dim)[i],
        attention, original, length,
    )  # fmt: skip


CASES = {
    "linear 1": linear(1.0),
    "linear 2.5": linear(2.5),
    "dynamic below": dynamic(2.0, 64, 5),
    "dynamic at": dynamic(2.0, 64, 64),
    "dynamic one above": dynamic(2.0, 64, 65),
    "dynamic far": dynamic(3.3, 48, 300),
    "dynamic factor 1": dynamic(1.0, 16, 64),
    "llama3": llama3(8.0, 1.0, 4.0, 8192),
    "llama3 other": llama3(32, 0.5, 30, 100),
    "yarn": yarn(4.0, 4096, 0.1 * math.log(4) + 1),
    "yarn 1": yarn(1.0, 4096, 1.0),
    "yarn short": yarn(2.5, 40, 0.1 * math.log(2.5) + 1),
    "yarn tiny": yarn(2.0, 6, 0.1 * math.log(2) + 1),  # the ramp begins and ends at the first pair
    "yarn betas": yarn(16, 2048, 0.1 * math.log(16) + 1, beta_fast=20.0, beta_slow=2.0),
    "yarn no truncate": yarn(16, 2048, 0.1 * math.log(16) + 1, truncate=False),
    "yarn no ramp": yarn(4.0, 4096, 0.1 * math.log(4) + 1, beta_fast=7.0, beta_slow=7.0, truncate=False),
    "yarn attention": yarn(4.0, 4096, 0.77, attention_factor=0.77, mscale=2.0, mscale_all_dim=0.5),
    "yarn mscale": yarn(
        40, 4096, (0.1 * 0.7 * math.log(40) + 1) / (0.1 * 1.5 * math.log(40) + 1), mscale=0.7, mscale_all_dim=1.5
    ),
    "yarn mscale alone": yarn(40, 4096, 0.1 * math.log(40) + 1, mscale=0.7),
    "longrope below": longrope(64, 63, 1.0),
    "longrope at": longrope(64, 64, math.sqrt(1 + math.log(32) / math.log(64)), factor=32.0),
    "longrope above": longrope(64, 65, math.sqrt(1 + math.log(65 / 64) / math.log(64))),
    "longrope attention": longrope(1, 8, 1.19, attention_factor=1.19),
}
