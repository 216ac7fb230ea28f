"""Works out the step of a call: how far its window goes, and where its tokens stand."""

from ..masks import Rule
from . import rows
from .chunk import Chunk
from .contents import EMPTY
from .layer import LayerCache
from .rows import Rows
from .step import Step


def sliding_window(cache: LayerCache | None, gained: Rows, window_size: int | None) -> int:
    """The window of a sliding call whose rows gain so many tokens after what `cache` has seen (None: nothing).

    Without a `window_size` it is the one that the cache fixed before, else what it holds, else the real length of this
    chunk.
    """
    if window_size is not None:
        return window_size
    held = 0 if cache is None else cache.window or (0 if cache.static else cache.held)
    # A chunk without a real token fixes nothing; its window is not used.
    return held or max(max(gained), 1)


def plan_step(cache: LayerCache | None, chunk: Chunk, rule: Rule, expanding_context: bool | None) -> Step:
    """The step of a call with `chunk` after what `cache` has seen (None: the call itself starts at 0).

    `expanding_context` is the mode that gave the rule. Raises ShapeError where the cache has another number of rows.
    """
    before, static = EMPTY, None if cache is None else cache.static
    if cache is not None and static is None:
        cache.check_batch(chunk.batch)
        before = cache.row_lengths
    before, gained = (before, chunk.gained) if chunk.real is None else rows.paired(before, chunk.gained)
    if static is not None:
        return static.plan(chunk, rule, expanding_context)
    return Step(
        rule,
        chunk.batch,
        chunk.tokens,
        before,
        gained,
        chunk.device,
        chunk.real,
        chunk.order,
        expanding_context=expanding_context,
    )
