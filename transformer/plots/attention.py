"""Pictures of attention: weights by head, and which keys a query may see."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention import real_tokens
from ..errors import ArgumentError, ShapeError, shown
from ..masks import NO_TOKEN, Rule, visible
from .canvas import BLUE, GREY, LIGHT_GREY, ORANGE, Axes, canvas, legend_of_colours

MOST_LABELS = 32
"""Maximum number of labels along one axis; more words do not fit."""

HIDDEN, VISIBLE, SINK, PADDING = range(4)
"""Values of the image that `plot_visibility` draws."""


def plot_attention(
    weights: Tensor,
    *,
    row: int = 0,
    heads: Sequence[int] | None = None,
    query_tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws attention weights, one image for each head, queries downwards and keys to the right.

    Args:
        weights: [B, H, L, S] as `return_weights=True` gives them, or [H, L, S], or [L, S] of one head.
        row: the row of the batch.
        heads: indices of the heads to draw, by default all.
        query_tokens, key_tokens: texts of the `L` queries and `S` keys, written along the axes up to 32 of them.
        ax: the axes to draw into, by default those of a new figure.

    All images share one scale, from 0 to the largest weight drawn. A weight of exactly 0, such as that of a key that
    the query may not see, is left blank.

    Raises ShapeError or ArgumentError for weights, rows, heads and texts that do not go together.
    """
    drawn = _chosen_heads(weights, row, heads)
    _, length, keys = drawn.shape
    _check_texts("query_tokens", query_tokens, length)
    _check_texts("key_tokens", key_tokens, keys)
    numbers = list(range(len(drawn))) if heads is None else list(heads)
    # As many columns as make the figure about square, and rather wide than high.
    columns = min(len(drawn), max(1, math.ceil(math.sqrt(len(drawn) * length / keys))))
    lines = -(-len(drawn) // columns)
    width, height = max(1.6, 4.8 / columns), max(0.5, min(1.0, length / keys) * max(1.6, 4.8 / columns))
    ax = canvas(ax, "plot_attention", 1.4 + columns * width, 0.7 + lines * (height + 0.3))

    from numpy import ma

    # Room for the name of a head above each image, in units of the data.
    step_x, step_y = keys * 1.08, length * (1 + 0.3 / height)
    most = float(drawn.max())
    image = None
    for index, head in enumerate(drawn):
        left, top = index % columns * step_x, index // columns * step_y
        image = ax.imshow(
            ma.masked_equal(head.numpy(), 0.0),
            extent=(left - 0.5, left + keys - 0.5, top + length - 0.5, top - 0.5),
            cmap="viridis_r",
            vmin=0.0,
            vmax=most or 1.0,
            aspect="auto",
            interpolation="nearest",
        )
        outline_x = [left - 0.5, left + keys - 0.5, left + keys - 0.5, left - 0.5, left - 0.5]
        outline_y = [top - 0.5, top - 0.5, top + length - 0.5, top + length - 0.5, top - 0.5]
        ax.plot(outline_x, outline_y, color=GREY, linewidth=0.8)
        ax.text(left - 0.5, top - 0.5 - 0.05 * length / height, f"head {numbers[index]}", fontsize=8, va="bottom")
    ax.set_xlim(-0.5 - 0.01 * keys, (columns - 1) * step_x + keys - 0.5 + 0.01 * keys)
    ax.set_ylim((lines - 1) * step_y + length - 0.5 + 0.01 * length, -0.5 - 0.3 / height * length)
    ax.set_aspect("auto" if max(length, keys) > 4 * min(length, keys) else "equal")
    below = [column * step_x for column in range(columns)]
    beside = [line * step_y for line in range(lines)]
    ax.set_xticks(*_ticks(below, keys, key_tokens), rotation=90 if key_tokens is not None else 0, fontsize=8)
    ax.set_yticks(*_ticks(beside, length, query_tokens), fontsize=8)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="key (token)", ylabel="query (token)")
    if image is not None:
        ax.figure.colorbar(image, ax=ax, label="attention weight (share of 1)", shrink=0.8)
    return ax


def plot_visibility(
    length: int,
    *,
    causal: bool = True,
    window_size: int | None = None,
    num_sinks: int = 0,
    attention_mask: Tensor | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws which keys each query of one sequence may see, by the rule that every attention module follows.

    Args:
        length: tokens of the sequence, padding included.
        causal: whether a query sees no key after it.
        window_size, num_sinks: of the sliding mode; None: no window.
        attention_mask: [length] or [1, length], true for a real token; padding takes no position.
        ax: the axes to draw into, by default those of a new figure.

    Raises ArgumentError, ShapeError or DtypeError for values that an attention module would refuse.
    """
    _check_whole("length", length, 1)
    if window_size is not None:
        _check_whole("window_size", window_size, 1)
    _check_whole("num_sinks", num_sinks, 0)
    if num_sinks and window_size is None:
        raise ArgumentError(f"num_sinks: expected 0 without a window_size, got {num_sinks}")
    if not isinstance(causal, bool):
        raise ArgumentError(f"causal: expected True or False, got {shown(causal)}")
    real = _real(attention_mask, length)
    position = torch.where(real, real.long().cumsum(0) - 1, NO_TOKEN)
    in_window = visible(position, position, Rule(causal, window_size))
    seen = visible(position, position, Rule(causal, window_size, num_sinks))
    image = torch.full((length, length), HIDDEN)
    image[seen] = SINK
    image[in_window] = VISIBLE
    image[~(real.unsqueeze(1) & real)] = PADDING
    size = min(6.0, 2.5 + 0.12 * length)
    ax = canvas(ax, "plot_visibility", size + 1.6, size)

    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    colours = {HIDDEN: LIGHT_GREY, VISIBLE: BLUE, SINK: ORANGE, PADDING: GREY}
    ax.imshow(image.numpy(), cmap=ListedColormap(list(colours.values())), vmin=0, vmax=3, interpolation="nearest")
    if length <= MOST_LABELS:
        edges = [edge - 0.5 for edge in range(length + 1)]
        ax.set_xticks(edges, minor=True)
        ax.set_yticks(edges, minor=True)
        ax.grid(which="minor", color="white", linewidth=1.0)
        ax.tick_params(which="minor", length=0)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="key (token)", ylabel="query (token)", title=_title(causal, window_size, num_sinks))
    names = {HIDDEN: "not visible", VISIBLE: "visible", SINK: "visible as sink", PADDING: "padding"}
    there = [value for value in (VISIBLE, SINK, HIDDEN, PADDING) if bool((image == value).any())]
    legend_of_colours(ax, {names[value]: colours[value] for value in there})
    return ax


def _title(causal: bool, window_size: int | None, num_sinks: int) -> str:
    parts = ["causal" if causal else "not causal"]
    if window_size is not None:
        parts.append(f"window of {window_size}")
    if num_sinks:
        parts.append("1 sink" if num_sinks == 1 else f"{num_sinks} sinks")
    return ", ".join(parts)


def _real(attention_mask: Tensor | None, length: int) -> Tensor:
    """bool [length] on the host, true for a real token."""
    if isinstance(attention_mask, Tensor):
        if attention_mask.shape not in ((length,), (1, length)):
            raise ShapeError(
                f"attention_mask: expected [{length}] or [1, {length}], got {list(attention_mask.shape)}; give one row"
            )
        attention_mask = attention_mask.detach().reshape(1, length).cpu()
    host = torch.device("cpu")
    real = real_tokens("attention_mask", attention_mask, 1, length, host)
    return torch.ones(length, dtype=torch.bool, device=host) if real is None else real[0]


def _chosen_heads(weights: object, row: int, heads: Sequence[int] | None) -> Tensor:
    """float32 [heads, L, S] on the host."""
    if not isinstance(weights, Tensor):
        raise ArgumentError(
            f"weights: expected a tensor [B, H, L, S], got {type(weights).__name__}; "
            "an attention module gives it with return_weights=True"
        )
    if not 2 <= weights.ndim <= 4 or not weights.numel():
        raise ShapeError(f"weights: expected [B, H, L, S], [H, L, S] or [L, S], none empty, got {list(weights.shape)}")
    if not weights.is_floating_point():
        raise ArgumentError(f"weights: expected a float dtype, got {weights.dtype}")
    every = weights.detach()[(None,) * (4 - weights.ndim)]
    if type(row) is not int or not 0 <= row < every.shape[0]:
        raise ArgumentError(f"row: expected a whole number from 0 to {every.shape[0] - 1}, got {shown(row)}")
    drawn = every[row]
    if heads is not None:
        wrong = [head for head in heads if type(head) is not int or not 0 <= head < len(drawn)]
        if wrong or not heads:
            raise ArgumentError(
                f"heads: expected at least one index from 0 to {len(drawn) - 1}, got {shown(wrong or list(heads))}"
            )
        drawn = drawn[list(heads)]
    return drawn.to("cpu", torch.float32)


def _check_texts(name: str, texts: Sequence[str] | None, number: int) -> None:
    if texts is not None and (isinstance(texts, str) or len(texts) != number):
        got = "one text" if isinstance(texts, str) else str(len(texts))
        raise ArgumentError(f"{name}: expected {number} texts, one for each token, got {got}")


def _check_whole(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise ArgumentError(f"{name}: expected a whole number of at least {least}, got {shown(value)}")


def _ticks(starts: Sequence[float], number: int, texts: Sequence[str] | None) -> tuple[list[float], list[str]]:
    """The positions and texts of the ticks along one axis, for images that begin at `starts`."""
    every = texts is not None and number <= MOST_LABELS
    marked = list(range(number)) if every else sorted({0, number - 1})
    names = [str(index) if texts is None else texts[index] for index in marked]
    return [start + index for start in starts for index in marked], names * len(starts)
