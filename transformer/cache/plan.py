"""Works out the step of a call: where its tokens stand, and how far its window goes."""

from ..masks import Rule
from . import rows
from .chunk import Chunk
from .contents import EMPTY
from .layer import LayerCache
from .step import Step


def plan_step(
    cache: LayerCache | None, chunk: Chunk, *, causal: bool, sliding: bool, window_size: int | None, num_sinks: int
) -> Step:
    """The step of a call with `chunk` after what `cache` has seen (None: the call itself starts at 0).

    Sliding without a `window_size` takes the window that the cache fixed before, else what it holds, else the real
    length of this chunk. Raises ShapeError where the cache has another number of rows.
    """
    before, static = EMPTY, None if cache is None else cache.static
    if cache is not None and static is None:
        cache.check_batch(chunk.batch)
        before = cache.row_lengths
    window = None
    if sliding:
        held = 0 if cache is None else cache.window or (0 if static else cache.held)
        # A chunk without a real token fixes nothing; its window is not used.
        window = window_size or held or max(max(chunk.gained), 1)
    before, gained = (before, chunk.gained) if chunk.real is None else rows.paired(before, chunk.gained)
    rule = Rule(causal, window, num_sinks)
    if static is not None:
        return static.plan(chunk, rule)
    return Step(rule, chunk.batch, chunk.tokens, before, gained, chunk.device, chunk.real, chunk.order)
