"""Targets and the figures that reach or miss them; a figure is a median with its 95 % interval, of the worst point."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .intervals import Interval
from .runner import Measured

AHEAD = 0.97
"""A peer is ahead where the whole interval of its time, as a multiple of ours, lies below this."""


class Bar(NamedTuple):
    """A target and its figures; `reached` is None if a run has not measured it."""

    asked: str
    reached: bool | None
    figures: str

    @property
    def verdict(self) -> str:
        """The result as text."""
        return "not measured" if self.reached is None else "met" if self.reached else "MISSED"


def peer_is_ahead(measured: Measured) -> bool:
    """True if the best other library was faster at this point, with 95 % confidence."""
    return measured.lead is not None and measured.lead.high < AHEAD


def at(results: Iterable[Measured], **point: str | int) -> list[Measured]:
    """Those results whose points have these values."""
    return [each for each in results if all(each.point.get(name) == value for name, value in point.items())]


def lead_bar(asked: str, points: Sequence[Measured], least: float) -> Bar:
    """The best other library takes at least so many times our time."""
    points = [each for each in points if each.lead is not None]
    return figure_bar(asked, points, lambda each: each.lead or NONE, lambda value: value.median >= least)


def not_behind_bar(asked: str, points: Sequence[Measured], name: str | None = None) -> Bar:
    """No library, or not that of this name, is ahead of us; within 3 %, or with intervals that overlap, is level."""
    points = [each for each in points if (each.lead if name is None else each.ratios.get(name)) is not None]
    return figure_bar(
        asked,
        points,
        lambda each: (each.lead or NONE) if name is None else each.ratios[name],
        lambda value: value.high >= AHEAD,
    )


def ratio_bar(asked: str, points: Sequence[Measured], name: str, least: float) -> Bar:
    """What has this name takes at least so many times our time."""
    points = [each for each in points if name in each.ratios]
    return figure_bar(asked, points, lambda each: each.ratios[name], lambda value: value.median >= least)


def part_bar(asked: str, points: Sequence[Measured], name: str, most: float, *, level: bool = False) -> Bar:
    """We take at most such a part of the time of what has this name; `level`: so far as the intervals tell."""
    points = [each for each in points if name in each.ratios]

    def part(each: Measured) -> Interval:
        ratio = each.ratios[name]
        return Interval(1 / ratio.median, 1 / ratio.high, 1 / ratio.low)

    reached = (lambda value: AHEAD * value.low <= most) if level else (lambda value: value.median <= most)
    return figure_bar(asked, points, part, reached, highest=True, unit=f"of the time of {name}")


def share_bar(asked: str, points: Sequence[Measured], least: float) -> Bar:
    """We reach at least such a part of the limit of the machine."""
    points = [each for each in points if each.share is not None]
    return figure_bar(
        asked, points, lambda each: each.share or NONE, lambda value: value.median >= least, unit="of the limit"
    )


def detail_bar(asked: str, points: Sequence[Measured], name: str, most: Callable[[Measured], float]) -> Bar:
    """A further figure is at most that of `most`."""
    if not points:
        return Bar(asked, None, "")
    missed = [each for each in points if each.details[name] > most(each)]
    worst = max(missed or points, key=lambda each: each.details[name] / most(each))
    figures = f"{_counted(points, missed)} {worst.details[name]:.2g} of at most {most(worst):.2g} ({where(worst)})"
    return Bar(asked, not missed, figures)


def figure_bar(
    asked: str,
    points: Sequence[Measured],
    figure: Callable[[Measured], Interval],
    reached: Callable[[Interval], bool],
    *,
    highest: bool = False,
    unit: str = "times our time",
) -> Bar:
    """A target that is reached if it is reached at each point; the figure is that of the worst point."""
    if not points:
        return Bar(asked, None, "")
    missed = [each for each in points if not reached(figure(each))]
    worst = (max if highest else min)(missed or points, key=lambda each: figure(each).median)
    median, low, high = figure(worst)
    figures = f"{_counted(points, missed)} {median:.2f} [{low:.2f}, {high:.2f}] {unit} ({where(worst)})"
    return Bar(asked, not missed, figures)


def where(measured: Measured) -> str:
    """The point in words."""
    return ", ".join(f"{name} {value}" for name, value in measured.point.items())


def _counted(points: Sequence[Measured], missed: Sequence[Measured]) -> str:
    return f"{len(points) - len(missed)} of {len(points)} points; worst"


NONE = Interval(0.0, 0.0, 0.0)
