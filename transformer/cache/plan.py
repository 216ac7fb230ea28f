"""Step of a call: how far its window goes, and where its tokens stand."""

import torch
from torch import Tensor

from ..masks import NO_TOKEN, Rule
from ..tracing import is_compiling
from .chunk import Chunk
from .contents import CacheContents
from .lengths import EMPTY, Lengths
from .static_layout import StaticLayout
from .step import Step


def sliding_window(contents: CacheContents | None, new_lengths: Lengths, window_size: int | None) -> int:
    """The window of a sliding call whose rows gain so many tokens after what a cache holds (None: nothing).

    Without a `window_size` it is the one that the cache fixed before, else what it holds, else the real length of this
    chunk.
    """
    if window_size is not None:
        return window_size
    held = 0
    if contents is not None and contents.state is not None:
        held = contents.state.window or (0 if frozen(contents) else max(contents.row_cached_lengths))
    # A chunk without a real token fixes nothing; its window is not used.
    return held or max(max(new_lengths), 1)


def plan_step(contents: CacheContents | None, chunk: Chunk, rule: Rule, expanding_context: bool | None) -> Step:
    """The step of a call with `chunk` after what a cache holds (None: the call itself starts at 0).

    `expanding_context` is the mode that gave the rule. Raises ShapeError where the cache has another number of rows.
    """
    static = None if contents is None else frozen(contents)
    if static is not None:
        return static.plan(chunk, rule, expanding_context)
    before = EMPTY
    if contents is not None:
        contents.check_batch(chunk.batch)
        before = contents.row_lengths
    new_lengths = chunk.new_lengths
    if chunk.real is not None:
        # Both with one entry for each row as soon as one of them has it.
        before, new_lengths = before.expand(len(new_lengths)), new_lengths.expand(len(before))
    return Step(
        rule,
        chunk.batch,
        chunk.tokens,
        before,
        new_lengths,
        chunk.device,
        chunk.real,
        chunk.order,
        expanding_context=expanding_context,
    )


def traced_step(x: Tensor, real: Tensor | None, rule: Rule, expanding_context: bool | None) -> Step:
    """The step of a traced call without a cache, with `x` [B, L, E] of which `real` [B, L] are tokens: tensors only.

    Its numbers of rows say nothing: `at` does.
    """
    batch, tokens = x.shape[:2]
    if real is None:
        at = torch.arange(tokens, dtype=torch.int64, device=x.device).unsqueeze(0)
    else:
        at = (real.long().cumsum(-1) - 1).masked_fill(~real, NO_TOKEN)
    return Step(
        rule, batch, tokens, EMPTY, EMPTY, x.device, real=real, at=at, traced=True, expanding_context=expanding_context
    )


def frozen(contents: CacheContents) -> StaticLayout | None:
    """What a step reads and writes that is being compiled now, over a frozen layout; None in any other."""
    state = contents.state
    return state if isinstance(state, StaticLayout) and is_compiling() else None
