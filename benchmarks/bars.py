"""Targets of speed and memory, compared with measurements."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from . import chunks, decode_step, importing, models, prefill, streaming, training, windowed_prefill
from .layers import SDPA
from .peers import DYNAMIC, TORCH, WHOLE
from .runner import OURS, Measured

AHEAD = 0.97
"""A peer is ahead where the whole interval of its time, as a multiple of ours, lies below this."""

LINEAR = 1.15
"""Time per pair of query and key may grow so much from the shortest prompt to the longest."""

FLAT = 0.9
"""A module at its start may take no less than this part of the time of one that has come far."""

FLAT_MEMORY = 64
"""Megabytes that the process may gain from the first mark to the last."""


class Bar(NamedTuple):
    """A target and its figures; `reached` is None if a run has not measured it."""

    asked: str
    reached: bool | None
    figures: str

    @property
    def verdict(self) -> str:
        """The result as text."""
        return "not measured" if self.reached is None else "reached" if self.reached else "NOT REACHED"


def peer_is_ahead(measured: Measured) -> bool:
    """True if the best other library was faster at this point, with 95 % confidence."""
    return measured.lead is not None and measured.lead.high < AHEAD


def all_bars(results: Sequence[Measured]) -> list[Bar]:
    """All targets, in order."""
    return [
        _nobody_ahead(results),
        *_decode(results),
        *_models(results),
        *_kernels(results),
        *_windowed(results),
        *_streaming(results),
        *_training(results),
        _import(results),
    ]


def _nobody_ahead(results: Sequence[Measured]) -> Bar:
    asked = f"no peer ahead at any point (no 95 % interval of best peer / ours wholly below {AHEAD})"
    return _bar(asked, [each for each in results if each.lead], lambda each: not peer_is_ahead(each), _lead)


def _decode(results: Sequence[Measured]) -> list[Bar]:
    points = [each for each in results if each.kind == decode_step.KIND]
    single = [each for each in points if each.point["dtype"] == "float32"]
    bars = []
    for groups, times in ((16, 5.0), (4, 4.0), (1, 2.5)):
        here = _at(single, cached=16384, batch=1, G=groups)
        asked = f"a float32 decode step over 16,384 tokens, G {groups}: {times:g} times DynamicCache's speed"
        bars.append(_ratio_bar(asked, here, DYNAMIC, times))
    for groups, part in ((16, 0.65), (4, 0.55), (1, 0.35)):
        here = [each for each in _at(single, G=groups) if int(each.point["cached"]) >= 2048]
        bars.append(_share_bar(f"the same from 2,048 tokens on, G {groups}: {part:.0%} of reading", here, part))
    half = [each for each in points if each.point["dtype"] == "bfloat16"]
    alike = [(each, _at(single, **{**each.point, "dtype": "float32"})) for each in half]
    times = {str(each.point): _slowdown(each, others[0]) for each, others in alike if others}
    pairs = [each for each, others in alike if others]
    bars.append(
        _bar(
            "a bfloat16 decode step not slower than float32 at the same point (intervals not apart)",
            pairs,
            lambda each: times[str(each.point)][1] <= 1.0,
            lambda each: times[str(each.point)][0],
            highest=True,
            unit="times float32's time",
        )
    )
    return bars


def _slowdown(half: Measured, single: Measured) -> tuple[float, float]:
    """Ratio of 16-bit time to float32 time: of the medians, and the minimum that the intervals allow."""
    mine, theirs = half.seconds[OURS], single.seconds[OURS]
    return mine.median / theirs.median, mine.low / theirs.high


def _models(results: Sequence[Measured]) -> list[Bar]:
    points = [each for each in results if each.kind == models.KIND and each.share is not None]
    return [
        _bar("whole models: twice transformers' tokens per second", points, lambda each: _lead(each) >= 2.0, _lead),
        _share_bar("whole models: 70 % of reading weights and cache once per token", points, 0.7),
    ]


def _kernels(results: Sequence[Measured]) -> list[Bar]:
    chunk = _at([each for each in results if each.kind == chunks.KIND], cached=16384, new=256)
    whole = [each for each in results if each.kind == prefill.KIND]
    return [
        _ratio_bar("a chunk of 256 on 16,384: within 1.15 of SDPA without a cache", chunk, SDPA, 1 / 1.15),
        _ratio_bar("prefill: within 1.05 of SDPA and its projections", whole, SDPA, 1 / 1.05),
    ]


def _windowed(results: Sequence[Measured]) -> list[Bar]:
    points = _at([each for each in results if each.kind == windowed_prefill.KERNEL], window=1024)
    asked = "windowed prefill of 16,384 over 1,024: the kernel 8 times SDPA's speed with its mask"
    bars = [_ratio_bar(asked, _at(points, tokens=16384), windowed_prefill.MASKED, 8.0)]
    asked = f"the same: linear in the length (time per pair of query and key grows less than {LINEAR} times)"
    if len(points) < 2:
        return [*bars, Bar(asked, None, "")]
    costs = [_per_pair(each) for each in points]
    growth = costs[-1] / costs[0]
    figures = f"{growth:.2f} from {points[0].point['tokens']:,} to {points[-1].point['tokens']:,} tokens"
    return [*bars, Bar(asked, growth <= LINEAR, figures)]


def _per_pair(measured: Measured) -> float:
    pairs = windowed_prefill.pairs(int(measured.point["window"]), int(measured.point["tokens"]))
    return measured.seconds[OURS].median / pairs


def _streaming(results: Sequence[Measured]) -> list[Bar]:
    points = _at([each for each in results if each.kind == streaming.KIND], window=1024, sinks=4)
    far = (
        f"streaming over 1,024 tokens and 4 sinks, up to {points[-1].point['tokens so far']:,} tokens" if points else ""
    )
    far = far or "streaming over 1,024 tokens and 4 sinks"
    bars = [
        _ratio_bar(f"{far}: flat in time, beside a module at its start", points, streaming.AT_THE_START, FLAT),
        _ratio_bar(f"{far}: 20 times as fast as recomputing the window", points, streaming.RECOMPUTING, 20.0),
    ]
    asked = f"{far}: flat in memory (its cache to the byte, the process within {FLAT_MEMORY} MB)"
    if not points:
        return [*bars, Bar(asked, None, "")]
    held = {each.held[OURS] for each in points}
    gained = points[-1].details["resident MB"] - points[0].details["resident MB"]
    figures = f"cache {max(held):,} bytes, the process {gained:+.0f} MB"
    return [*bars, Bar(asked, len(held) == 1 and gained <= FLAT_MEMORY, figures)]


def _training(results: Sequence[Measured]) -> list[Bar]:
    points = [each for each in results if each.kind == training.KIND]
    rivals = TORCH, WHOLE

    def least(values: dict[str, float]) -> float:
        return min(values[name] for name in rivals if name in values)

    return [
        _bar(
            "training step not slower than torch.nn.MultiheadAttention and transformers",
            points,
            lambda each: least({name: ratio.high for name, ratio in each.ratios.items()}) >= AHEAD,
            lambda each: least({name: ratio.median for name, ratio in each.ratios.items()}),
        ),
        _bar(
            "training step: peak memory not above theirs",
            points,
            lambda each: each.held[OURS] <= least(each.held),
            lambda each: least(each.held) / each.held[OURS],
            unit="times our memory",
        ),
    ]


def _import(results: Sequence[Measured]) -> Bar:
    asked = "import of transformer: under 0.2 s over import torch"
    seconds = [each.details[importing.SECONDS] for each in results if each.kind == importing.KIND]
    return Bar(asked, seconds[0] < 0.2, f"{seconds[0]:.3f} s") if seconds else Bar(asked, None, "")


def _at(results: Iterable[Measured], **point: str | int) -> list[Measured]:
    return [each for each in results if all(each.point[name] == value for name, value in point.items())]


def _lead(measured: Measured) -> float:
    return 0.0 if measured.lead is None else measured.lead.median


def _ratio_bar(asked: str, points: Sequence[Measured], name: str, least: float) -> Bar:
    def figure(each: Measured) -> float:
        return each.ratios[name].median

    return _bar(asked, points, lambda each: figure(each) >= least, figure)


def _share_bar(asked: str, points: Sequence[Measured], least: float) -> Bar:
    def figure(each: Measured) -> float:
        return 0.0 if each.share is None else each.share.median

    return _bar(asked, points, lambda each: figure(each) >= least, figure, unit="of the limit")


def _bar(
    asked: str,
    points: Sequence[Measured],
    reached: Callable[[Measured], bool],
    figure: Callable[[Measured], float],
    *,
    highest: bool = False,
    unit: str = "times our time",
) -> Bar:
    """A target that is reached if it is reached at each point; the figure is that of the worst point."""
    if not points:
        return Bar(asked, None, "")
    missed = [each for each in points if not reached(each)]
    worst = (max if highest else min)(missed or points, key=figure)
    where = ", ".join(f"{name} {value}" for name, value in worst.point.items())
    figures = f"{len(points) - len(missed)} of {len(points)} points; worst {figure(worst):.2f} {unit} ({where})"
    return Bar(asked, not missed, figures)
