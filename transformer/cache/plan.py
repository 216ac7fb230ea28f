"""Works out the step of a call: where its tokens stand, how far its window goes, which tokens are real."""

import torch
from torch import Tensor

from ..masks import Rule
from . import rows
from .layer import EMPTY, LayerCache
from .rows import Rows
from .step import Step


def plan_step(
    cache: LayerCache | None,
    x: Tensor,
    real: Tensor | None,
    *,
    causal: bool,
    sliding: bool,
    window_size: int | None,
    num_sinks: int,
) -> Step:
    """The step of a call with `x` [B, L, E] after what `cache` has seen (None: the call itself starts at 0).

    `real` is bool [B, L], and looked at once on the host; where it is None nothing is looked at. Sliding without a
    `window_size` takes the window that the cache fixed before, else what it holds, else the real length of this chunk.
    """
    before = EMPTY
    if cache is not None:
        cache.check_batch(x.shape[0])
        before = cache.row_lengths
    before, gained, order = _rows_gained(before, x, real)
    window = None
    if sliding:
        held = 0 if cache is None else cache.window or cache.held
        # A chunk without a real token fixes nothing; its window is not used.
        window = window_size or held or max(max(gained), 1)
    if max(gained) == x.shape[1] == min(gained):
        real = None
    return Step(Rule(causal, window, num_sinks), x.shape[0], x.shape[1], before, gained, x.device, real, order)


def _rows_gained(before: Rows, x: Tensor, real: Tensor | None) -> tuple[Rows, Rows, Tensor | None]:
    """Lengths before, real tokens gained, and the order that left-aligns them (None: they stand so already)."""
    if real is None:
        return before, (x.shape[1],), None
    on_host = real.cpu()
    gained = rows.alike(on_host.sum(-1).tolist()) or EMPTY
    before, gained = rows.paired(before, gained)
    if bool((on_host[:, :-1] >= on_host[:, 1:]).all()):
        return before, gained, None
    # A stable sort by "is padding" brings the real tokens of each row to the front, in their order.
    order = (~on_host).to(torch.uint8).argsort(dim=-1, stable=True)[:, : max(gained)]
    return before, gained, order.to(x.device)
