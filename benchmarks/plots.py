"""Plots of a run: decode steps with the best other library and the limit, and streams by length."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import decode_step, streaming
from .intervals import Interval
from .runner import OURS, Measured


def draw(results: Sequence[Measured], path: Path) -> list[str]:
    """Writes image files whose paths begin with `path`; returns their names."""
    pictures = {
        "decode": (_decode, [each for each in results if each.kind == decode_step.KIND]),
        "streaming": (_streaming, [each for each in results if each.kind == streaming.KIND]),
    }
    names = []
    for name, (picture, points) in pictures.items():
        if points:
            file = path.with_name(f"{path.name}-{name}.png")
            picture(points).savefig(file, dpi=120)
            names.append(file.name)
    return names


def _decode(points: Sequence[Measured]) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    lead, share = figure.subplots(1, 2)
    order = ("dtype", "batch", "G")
    points = sorted(points, key=lambda each: [str(each.point[name]) for name in order])
    dtypes, colours = list(dict.fromkeys(each.point["dtype"] for each in points)), {}
    for label, line in groupby(points, lambda each: ", ".join(f"{name} {each.point[name]}" for name in order)):
        cached = list(line)
        dtype, *others = (cached[0].point[name] for name in order)
        # One colour for each batch and G, one line style for each dtype.
        colour = colours.setdefault(tuple(others), f"C{len(colours)}")
        style = {"color": colour, "linestyle": ("--", "-")[dtypes.index(dtype) % 2]}
        lengths = [float(each.point["cached"]) for each in cached]
        _line(lead, lengths, [each.lead for each in cached], label, **style)
        _line(share, lengths, [each.share for each in cached], label, **style)
    lead.axhline(1.0, color="gray", linewidth=0.8)
    lead.set(title="One decode step beside the best peer", ylabel="time of the best peer / ours")
    lead.set(xscale="log", yscale="log", xlabel="cached tokens")
    share.set(title="One decode step beside the limit", ylabel="time of reading the buffers once / ours")
    share.set(xscale="log", ylim=(0, None), xlabel="cached tokens")
    figure.legend(*share.get_legend_handles_labels(), loc="outside right upper", fontsize="x-small", handlelength=4)
    return figure


def _streaming(points: Sequence[Measured]) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    times, memory = figure.subplots(1, 2)
    lines = groupby(points, lambda each: f"window {each.point['window']}, sinks {each.point['sinks']}")
    for index, (label, line) in enumerate(lines):
        marks, colour = list(line), f"C{index}"
        tokens = [float(each.point["tokens so far"]) for each in marks]
        recomputing = streaming.RECOMPUTING
        for name, text, style in ((OURS, label, "-"), (recomputing, f"{label}, {recomputing}", "--")):
            values = [each.seconds[name].scaled(1e6) for each in marks]
            _line(times, tokens, values, text, color=colour, linestyle=style)
        memory.plot(tokens, [each.held[OURS] / 1e6 for each in marks], marker="o", color=colour, label=label)
        full = float(marks[0].point["window"]) + float(marks[0].point["sinks"])
        for axes in (times, memory):
            axes.axvline(full, color=colour, linestyle=":", label=f"{label}: full")
    times.set(title="Time of a streamed token", yscale="log", xlabel="tokens so far", ylabel="time per token (µs)")
    memory.set(title="Size of the cache", ylim=(0, None), xlabel="tokens so far", ylabel="cache (MB)")
    times.legend(fontsize="x-small", handlelength=4)
    memory.legend(fontsize="x-small")
    return figure


def _line(axes: Axes, x: Sequence[float], values: Sequence[Interval | None], label: str, **style: str) -> None:
    """Medians, with their intervals as bars."""
    known = [(at, value) for at, value in zip(x, values, strict=True) if value is not None]
    medians = [value.median for _, value in known]
    below = [value.median - value.low for _, value in known]
    above = [value.high - value.median for _, value in known]
    lengths, bars = [at for at, _ in known], (below, above)
    axes.errorbar(lengths, medians, bars, marker="o", markersize=3, capsize=2, label=label, **style)
