"""Prefill: a prompt is read in chunks of its columns, into caches that get their room once."""

from collections.abc import Callable, Iterator, Sequence

from .prompt import Prompt

PromptProgress = Callable[[int, int], object]
"""Called with the number of columns of a prompt that were read, and of all columns."""

CHUNK_TOKENS = 2048
"""Tokens of all rows that are read at a time by default."""

CHUNK_COLUMNS = 256
"""Columns that are read at a time at least by default, so that a chunk of many rows still is large matrix products."""

MIN_ROOM = 256
"""New tokens that get room beside a prompt of fewer tokens."""


def chunks(columns: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` columns."""
    for first in range(0, columns, size):
        yield slice(first, first + size)


def chunk_size(given: int | None, prompt: Prompt, compresses: bool, window: int | None = None) -> int:
    """Columns of a prompt that are read at a time: as given, or a default number.

    By default chunks are equally long, so that no call is left with a few columns, and not longer than a `window`, into
    whose buffers they are then written in place (a shorter one than `CHUNK_COLUMNS` takes little memory). Where caches
    are compressed after each call, a prompt is by default one call: its policy then chooses among all tokens.
    """
    columns = prompt.columns
    if given is not None or compresses:
        return min(given or columns, columns)
    most = max(CHUNK_TOKENS // len(prompt.lengths), CHUNK_COLUMNS)
    if window is not None and window >= CHUNK_COLUMNS:
        most = min(most, window)
    return -(-columns // -(-columns // most))


def room(prompt: Prompt, limits: Sequence[int]) -> int:
    """Slots to reserve for a prompt and at most as many new tokens, or `MIN_ROOM`.

    More new tokens need no promise: an end of a row may come early, and caches grow.
    """
    return prompt.columns + min(max(limits), max(prompt.columns, MIN_ROOM))
