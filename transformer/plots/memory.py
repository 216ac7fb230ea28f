"""Picture of memory: bytes that a model's caches take as a conversation grows."""

from collections.abc import Sequence

from torch import nn

from ..cache import cache_bytes
from ..cache.allocation import LayerPlans
from ..errors import ArgumentError, shown
from .canvas import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, Axes, canvas

STYLES = [("o-", BLUE), ("s--", VERMILION), ("^-.", GREEN), ("D:", PURPLE), ("v-", ORANGE), ("x--", SKY)]
"""Styles of the lines in one picture, which differ in marker and dashes as well as in colour."""


def plot_cache_bytes(
    model_or_config: nn.Module | LayerPlans,
    lengths: Sequence[int],
    *,
    batch: int = 1,
    source_length: int | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws what `cache_bytes` counts, over numbers of tokens per row.

    Args:
        model_or_config: a model, or the configuration of one that need not exist yet.
        lengths: numbers of tokens that each row has seen.
        batch, source_length: as of `cache_bytes`.
        label: what the legend calls this line; several calls with the same `ax` compare models.
        ax: the axes to draw into, by default those of a new figure.

    Raises ArgumentError for no lengths at all, and as `cache_bytes`.
    """
    _check_lengths(lengths)
    most = [cache_bytes(model_or_config, batch, length, source_length) for length in lengths]
    ax = canvas(ax, "plot_cache_bytes", 6.5, 4.0)

    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    style, colour = STYLES[len(ax.get_lines()) % len(STYLES)]
    ax.plot(lengths, most, style, color=colour, label=label, markersize=4)
    ax.yaxis.set_major_formatter(EngFormatter(unit="B"))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    rows = "1 row" if batch == 1 else f"{batch:,} rows"
    ax.set(xlabel="length (tokens of each row)", ylabel="keys and values (bytes)", title=f"KV cache of {rows}")
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    if label is not None:
        ax.legend()
    return ax


def _check_lengths(lengths: object) -> None:
    if not isinstance(lengths, Sequence) or not lengths:
        raise ArgumentError(f"lengths: expected a sequence of at least one number of tokens, got {shown(lengths)}")
