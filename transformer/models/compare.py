"""Comparison of generation with and without caches: both are timed in turn."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, CacheStateError, shown
from ..extras import missing
from .decoder_only import DecoderOnlyTransformer
from .encoder_decoder import EncoderDecoderTransformer

Model = DecoderOnlyTransformer | EncoderDecoderTransformer


@dataclass(frozen=True, slots=True)
class Comparison:
    """Generation of `new_tokens` per row, with caches and without: seconds are medians over the runs."""

    new_tokens: int
    batch_size: int
    seconds_cached: float
    seconds_uncached: float
    cache_bytes: int
    equal: bool
    """Whether both gave the same tokens."""

    @property
    def speed_up(self) -> float:
        """Time without caches divided by time with caches."""
        return self.seconds_uncached / self.seconds_cached

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Of all rows together: cached, uncached."""
        tokens = self.new_tokens * self.batch_size
        return tokens / self.seconds_cached, tokens / self.seconds_uncached


class ComparisonTable(tuple[Comparison, ...]):
    """Comparisons, one for each length; printed, a table."""

    def __str__(self) -> str:
        names = (
            "tokens",
            "cached s",
            "uncached s",
            "cached tok/s",
            "uncached tok/s",
            "speed-up",
            "cache bytes",
            "equal",
        )
        widths = [max(len(name), 8) for name in names]
        lines = ["  ".join(name.rjust(width) for name, width in zip(names, widths, strict=True))]
        for row in self:
            cached, uncached = row.tokens_per_second
            cells = (
                f"{row.new_tokens:,}",
                f"{row.seconds_cached:.3f}",
                f"{row.seconds_uncached:.3f}",
                f"{cached:,.1f}",
                f"{uncached:,.1f}",
                f"{row.speed_up:.2f}",
                f"{row.cache_bytes:,}",
                "yes" if row.equal else "NO",
            )
            lines.append("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
        return "\n".join(lines)


def compare_generation(
    model: Model,
    lengths: Sequence[int] = (10, 50, 100, 200),
    batch_size: int = 1,
    runs: int = 3,
    *,
    prompt: Tensor | None = None,
    prompt_length: int = 16,
    progress: bool = True,
) -> ComparisonTable:
    """Times greedy generation of each of `lengths` new tokens, with and without caches in turn, `runs` times.

    Args:
        model: in `eval()` mode, with caches off.
        lengths: new tokens per row; stop tokens are ignored.
        batch_size, prompt_length: of a random prompt or source.
        prompt: a prompt or source to use instead.
        progress: whether to show a bar (needs tqdm).

    Raises ArgumentError for numbers below 1, and CacheStateError where caches are on: their content would be lost.
    """
    for name, value in (("batch_size", batch_size), ("runs", runs), ("prompt_length", prompt_length), *_named(lengths)):
        if type(value) is not int or value < 1:
            raise ArgumentError(f"{name}: expected a whole number of at least 1, got {shown(value)}")
    if model.kv_cache is not None:
        raise CacheStateError("model: expected one whose caches are off; save its conversation, then disable_cache()")
    prompt = _random_prompt(model, batch_size, prompt_length) if prompt is None else prompt
    turns = [(length, run) for length in lengths for run in range(runs)]
    seconds: dict[tuple[int, bool], list[float]] = {(n, use): [] for n in lengths for use in (True, False)}
    tokens: dict[tuple[int, bool], Tensor] = {}
    for use_cache in (True, False):  # warm-up
        model.generate(prompt, max_new_tokens=2, stop_tokens=(), use_cache=use_cache)
    for length, _ in _shown(turns, progress):
        for use_cache in (True, False):
            began = time.perf_counter()
            tokens[length, use_cache] = model.generate(
                prompt, max_new_tokens=length, stop_tokens=(), use_cache=use_cache
            )
            seconds[length, use_cache].append(time.perf_counter() - began)
    return ComparisonTable(
        Comparison(
            length,
            prompt.shape[0],
            statistics.median(seconds[length, True]),
            statistics.median(seconds[length, False]),
            _bytes_after(model, prompt, length),
            torch.equal(tokens[length, True], tokens[length, False]),
        )
        for length in lengths
    )


def plot_comparison(results: Sequence[Comparison], path: str | PathLike[str]) -> None:
    """Draws seconds and speed-up against the number of new tokens into an image file (needs matplotlib)."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing("plots", "plot_comparison", error) from error
    figure = Figure(figsize=(9, 4), layout="constrained")
    times, ratios = figure.subplots(1, 2)
    lengths = [row.new_tokens for row in results]
    times.plot(lengths, [row.seconds_uncached for row in results], marker="o", label="without caches")
    times.plot(lengths, [row.seconds_cached for row in results], marker="o", label="with caches")
    times.set(title="Time to generate", xlabel="new tokens", ylabel="time (s)", ylim=(0, None))
    times.legend()
    ratios.plot(lengths, [row.speed_up for row in results], marker="o", color="tab:green", label="speed-up")
    ratios.axhline(1.0, color="gray", linewidth=0.8, label="no difference")
    ratios.set(title="Speed-up by caches", xlabel="new tokens", ylabel="time without / with caches", ylim=(0, None))
    ratios.legend()
    figure.savefig(path, dpi=150)


def _named(lengths: Sequence[int]) -> list[tuple[str, int]]:
    return [("lengths", length) for length in lengths]


def _random_prompt(model: Model, batch_size: int, length: int) -> Tensor:
    device = next(model.parameters()).device
    if isinstance(model, DecoderOnlyTransformer):
        return torch.randint(model.config.vocab_size, (batch_size, length), device=device)
    if model.config.src_vocab_size is not None:
        return torch.randint(model.config.src_vocab_size, (batch_size, length), device=device)
    return torch.randn(batch_size, length, model.config.d_model, device=device)


def _bytes_after(model: Model, prompt: Tensor, length: int) -> int:
    """Bytes of the caches after the prompt and all new tokens."""
    model.enable_cache()
    try:
        model.generate(prompt, max_new_tokens=length, stop_tokens=())
        return 0 if model.kv_cache is None else model.kv_cache.nbytes
    finally:
        model.disable_cache()


def _shown(turns: Sequence[tuple[int, int]], progress: bool) -> Any:
    if not progress:
        return turns
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise missing("examples", "the bar of compare_generation (progress=False leaves it out)", error) from error
    return tqdm(turns, desc="generating with and without caches", leave=False)
