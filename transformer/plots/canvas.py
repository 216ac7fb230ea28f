"""Axes and colours that all pictures share, and the import of matplotlib where it is installed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from ..extras import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
else:
    try:
        from matplotlib.axes import Axes
    except ModuleNotFoundError:
        # Annotations resolve, and the first call says what is missing.
        Axes = Any

# From the palette of Okabe and Ito, made for the common kinds of colour blindness, and greys.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
LIGHT_GREY, GREY = "#ECECEC", "#A6A6A6"


def canvas(ax: object, function: str, width: float, height: float) -> Axes:
    """The given axes, or those of a new pyplot figure of this size in inches.

    Raises ArgumentError where `ax` is neither None nor Axes, and ModuleNotFoundError, naming the extra, without
    matplotlib.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise missing("plots", function, error) from error
    if ax is None:
        return pyplot.subplots(figsize=(width, height), layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise ArgumentError(f"ax: expected None or a matplotlib Axes, got {type(ax).__name__}")
    return ax


def legend_of_colours(ax: Axes, colours: Mapping[str, str], *, above: bool = False) -> None:
    """A legend with one patch for each label, to the right of the axes, or above them in one line."""
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, edgecolor=GREY, label=label) for label, colour in colours.items()]
    if above:
        ax.legend(handles=patches, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(patches), frameon=False)
    else:
        ax.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0, frameon=False)
