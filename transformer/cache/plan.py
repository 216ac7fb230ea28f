"""Works out the step of a call: where its tokens stand, how far its window goes, which tokens are real."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..masks import Rule
from . import rows
from .layer import EMPTY, LayerCache
from .rows import Rows
from .step import Step


class Chunk(NamedTuple):
    """The tokens of one call, whoever attends to them: the host's one look at their mask."""

    batch: int
    tokens: int
    """L as given, padding included."""
    gained: Rows
    """How many real tokens each row gains."""
    device: torch.device
    real: Tensor | None
    """bool [B, L], true for a real token; None where all are."""
    order: Tensor | None
    """int64 [B, width]: the given column of each left-aligned token; None where they stand so already."""

    @classmethod
    def of(cls, x: Tensor, real: Tensor | None) -> "Chunk":
        """The chunk `x` [B, L, E] of which `real` (bool [B, L]) are tokens; None: all, and nothing is looked at."""
        batch, tokens = x.shape[:2]
        if real is None:
            return cls(batch, tokens, (tokens,), x.device, None, None)
        on_host = real.cpu()
        gained = rows.alike(on_host.sum(-1).tolist()) or EMPTY
        if max(gained) == tokens == min(gained):
            real = None
        order = None
        if not bool((on_host[:, :-1] >= on_host[:, 1:]).all()):
            # A stable sort by "is padding" brings the real tokens of each row to the front, in their order.
            order = (~on_host).to(torch.uint8).argsort(dim=-1, stable=True)[:, : max(gained)].to(x.device)
        return cls(batch, tokens, gained, x.device, real, order)


def plan_step(
    cache: LayerCache | None, chunk: Chunk, *, causal: bool, sliding: bool, window_size: int | None, num_sinks: int
) -> Step:
    """The step of a call with `chunk` after what `cache` has seen (None: the call itself starts at 0).

    Sliding without a `window_size` takes the window that the cache fixed before, else what it holds, else the real
    length of this chunk. Raises ShapeError where the cache has another number of rows.
    """
    before = EMPTY
    if cache is not None:
        cache.check_batch(chunk.batch)
        before = cache.row_lengths
    window = None
    if sliding:
        held = 0 if cache is None else cache.window or cache.held
        # A chunk without a real token fixes nothing; its window is not used.
        window = window_size or held or max(max(chunk.gained), 1)
    before, gained = (before, chunk.gained) if chunk.real is None else rows.paired(before, chunk.gained)
    rule = Rule(causal, window, num_sinks)
    return Step(rule, chunk.batch, chunk.tokens, before, gained, chunk.device, chunk.real, chunk.order)
