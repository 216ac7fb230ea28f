"""Picture of a KV cache: which tokens of each row are cached, evicted, or kept as sinks."""

from collections.abc import Mapping
from typing import NamedTuple

from ..cache import KVCache, LayerCache
from ..errors import ArgumentError, CacheStateError
from .canvas import BLUE, GREEN, LIGHT_GREY, ORANGE, Axes, canvas, legend_of_colours

SINKS, EVICTED, CACHED, SOURCE = "sinks, cached", "evicted", "cached", "source of cross-attention"
COLOURS = {SINKS: ORANGE, EVICTED: LIGHT_GREY, CACHED: BLUE, SOURCE: GREEN}


class RowTokens(NamedTuple):
    """Numbers of tokens of one row: those kept as sinks, evicted, cached beside the sinks, and of a source."""

    sinks: int
    evicted: int
    cached: int
    source: int

    def __str__(self) -> str:
        if self.source:
            return f"source of {self.source:,}"
        return f"{self.sinks + self.evicted + self.cached:,} seen, {self.sinks + self.cached:,} cached"


def plot_cache(cache: LayerCache | KVCache, *, ax: Axes | None = None) -> Axes:
    """Draws each row of a cache as a bar over the positions of its sequence, from the first token to the newest.

    The parts of a bar, in order of position: sinks, evicted tokens, cached tokens. Of a whole model's cache, layers
    that hold the same numbers of tokens share their bars. After `compress` the tokens that are kept, of each key/value
    head others, are drawn as the newest. A source that cross-attention keeps has bars of its own.

    Args:
        cache: `module.kv_cache` of one attention module, or a whole model's `KVCache`.
        ax: the axes to draw into, by default those of a new figure.

    Raises ArgumentError for anything else, CacheStateError for a cache that has read nothing yet.
    """
    if isinstance(cache, LayerCache):
        layers = {"": cache}
    elif isinstance(cache, KVCache):
        layers = cache.layers
    else:
        raise ArgumentError(
            f"cache: expected a LayerCache or a KVCache, got {type(cache).__name__}; "
            "module.kv_cache and model.kv_cache give one after a call with caches on"
        )
    groups = _alike(layers)
    if not groups:
        raise CacheStateError("cache: expected one that has read tokens, got an empty one; call the model first")
    bars = [
        (f"row {number}" + (f"\n{names}" if len(groups) > 1 else ""), row)
        for rows, names in groups.items()
        for number, row in enumerate(rows)
    ]
    ax = canvas(ax, "plot_cache", 8.0, 1.5 + len(bars) * (0.55 if len(groups) > 1 else 0.4))
    for line, (_, row) in enumerate(bars):
        begin = 0
        for part, tokens in zip(COLOURS, row, strict=True):
            ax.barh(line, tokens, left=begin, height=0.7, color=COLOURS[part], edgecolor="white", label=part)
            begin += tokens
        ax.annotate(str(row), (begin, line), (4, 0), textcoords="offset points", va="center", fontsize=8)
    longest = max(sum(row) for _, row in bars)
    ax.set_xlim(0, longest * 1.3)
    ax.set_ylim(len(bars) - 0.5, -0.5)
    ax.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    title = "KV cache" if isinstance(cache, LayerCache) else f"KV cache of {len(layers)} layers"
    ax.set_xlabel("position in the row (tokens)")
    ax.set_title(title, loc="left", pad=26)
    there = [part for index, part in enumerate(COLOURS) if any(row[index] for _, row in bars)]
    legend_of_colours(ax, {part: COLOURS[part] for part in there}, above=True)
    return ax


def _alike(layers: Mapping[str, LayerCache]) -> dict[tuple[RowTokens, ...], str]:
    """The rows of layers that hold the same numbers of tokens, and what these layers are called."""
    groups: dict[tuple[RowTokens, ...], list[str]] = {}
    for name, cache in layers.items():
        if rows := _rows(cache):
            groups.setdefault(rows, []).append(name)
    return {rows: names[0] + (f" and {len(names) - 1} more" if names[1:] else "") for rows, names in groups.items()}


def _rows(cache: LayerCache) -> tuple[RowTokens, ...]:
    if cache.length == 0:
        source = cache["key"]
        return (RowTokens(0, 0, 0, source.shape[2]),) * source.shape[0] if source.shape[2] else ()
    rows = []
    for length, cached in zip(cache.lengths.tolist(), cache.cached_lengths.tolist(), strict=True):
        # Sinks are never evicted, and evicted tokens come right after them.
        sinks = min(cache.num_sinks, length)
        rows.append(RowTokens(sinks, length - cached, cached - sinks, 0))
    return tuple(rows)
