"""Plots: each has a title, axes with units, a legend where there are several lines, and a mark at the window."""

import importlib
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from transformer.models.compare import Comparison, plot_comparison

from .conftest import EXAMPLES


@pytest.fixture
def drawn(monkeypatch, tmp_path) -> list[Figure]:
    """The figures that are saved, as they are drawn."""
    figures = []

    def savefig(figure, *_, **__):
        figure.draw_without_rendering()
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    monkeypatch.syspath_prepend(EXAMPLES / "digits")
    monkeypatch.syspath_prepend(EXAMPLES)
    return figures


def language_model(window: int) -> None:
    plot = importlib.import_module("language_model").plot_times
    plot(Path("time.png"), 20, [0.001] * 100, [0.002] * 100, window)


def digits_benchmark() -> None:
    plot = importlib.import_module("benchmark").plot
    times = {5: (0.1, 0.2), 10: (0.2, 0.4)}
    plot(Path("time.png"), {"small": times, "large": times})


def cache_tokens() -> None:
    module = importlib.import_module("cache_tokens")
    names = [*module.policies(8), module.WINDOW_LINE]
    module.plot(Path("kept.png"), 1.4, {name: [1.5] * len(module.SHARES) for name in names})


def comparison() -> None:
    plot_comparison([Comparison(length, 2, 0.5, 1.0, 4096, True) for length in (10, 20)], "plot.png")


@pytest.mark.parametrize("draw", [lambda: language_model(64), digits_benchmark, comparison, cache_tokens])
def test_lines_have_titles_units_and_legends(drawn, draw):
    draw()
    (figure,) = drawn
    for axes in figure.axes:
        assert axes.get_title()
        units = axes.get_xlabel() + axes.get_ylabel()
        assert any(word in axes.get_xlabel() for word in ("tokens", "digits"))
        assert any(word in units for word in ("(ms)", "(s)", "time without / with caches", "bits per byte"))
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert len(labels) == len(axes.get_lines()) == len(set(labels))
        colours = [line.get_color() for line in axes.get_lines()]
        assert len(set(colours)) == len(colours)


@pytest.mark.parametrize(("window", "marked"), [(64, True), (120, True), (121, False)])
def test_the_window_is_marked_where_the_context_reaches_it(drawn, window, marked):
    language_model(window)
    (axes,) = drawn[0].axes
    marks = [line for line in axes.get_lines() if "window" in line.get_label()]
    assert [line.get_xdata()[0] for line in marks] == [window] * marked


def test_strips_stand_beside_what_was_read_and_what_is_right(drawn):
    read, strips = importlib.import_module("read"), importlib.import_module("strips")
    both = strips.Strips(torch.rand(2, 10, 30), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    read.draw(Path("strips.png"), both, [[1, 2, 3], [4, 5, 7, 7]])
    (figure,) = drawn
    assert "red: wrong" in figure.get_suptitle()
    labels = [axes.yaxis.label for axes in figure.axes]
    assert [label.get_text() for label in labels] == ["123", "4577, is 456"]
    assert [label.get_color() for label in labels] == ["black", "red"]
