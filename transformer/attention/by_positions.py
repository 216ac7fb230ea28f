"""Self-attention without a mask: positions of rows, windows, sinks and distances given to the kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import FlatRun, KeyValueView, Step
from ..kernels import (
    DistanceBias,
    Positioned,
    PositionedSinks,
    Positions,
    by_positions,
    by_positions_on_gpu,
    reads_positions,
)
from ..masks import Rule
from ..positions import ALiBi, ScoreBias
from .call import AttentionCall

FAR = 1 << 62
"""A position that no query reaches."""


def attend_by_positions(
    call: AttentionCall, view: KeyValueView, query: Tensor, sink_query: Tensor, score_bias: ScoreBias | None
) -> Tensor | None:
    """Attended heads [B, H, width, D]; None where a mask is needed, or no kernel reads positions for this call.

    Compiled kernels read records as they are stored.
    """
    step, kernel = call.step, call.heads.kernel
    if step is None or needs_more(call, step, view):
        return None
    if query.is_cuda:
        return None if score_bias is not None else _on_gpu(call, step, view, query)
    rule = step.rule
    if (view.sink_key is not None and not rule.causal) or not reads_positions(
        kernel, query, view.key, view.value, view.coding
    ):
        return None
    sinks = bias = None
    if view.sink_key is not None and view.sink_value is not None:
        reach = rule.max_sink_distance
        sinks = PositionedSinks(sink_query, view.sink_key, view.sink_value, FAR if reach is None else reach)
    if score_bias is not None:
        bias = _distance_bias(score_bias, query.shape[1], step, view)
    positioned = Positioned(positions_of(step, view), sinks, bias)
    return by_positions(kernel, query, view.key, view.value, positioned, view.coding)


def attend_flat(call: AttentionCall, view: KeyValueView, query: Tensor, run: FlatRun) -> Tensor | None:
    """Attended heads of flat queries [1, H, N, D], as flat; None where no kernel of a GPU takes rows as they lie."""
    step = call.step
    if step is None or not query.is_cuda or isinstance(call.heads.position, ScoreBias):
        return None
    if call.last_queries or needs_more(call, step, view):
        return None
    return _on_gpu(call, step, view, query, run.lengths)


def _on_gpu(
    call: AttentionCall, step: Step, view: KeyValueView, query: Tensor, lengths: Sequence[int] | None = None
) -> Tensor | None:
    """By flash attention, which has no sinks; None where it does not serve."""
    if view.sink_key is not None:
        return None
    positions = positions_of(step, view)
    return by_positions_on_gpu(call.heads.kernel, query, view.key, view.value, positions, step.once, lengths)


def needs_more(call: AttentionCall, step: Step, view: KeyValueView) -> bool:
    """True if positions on the host do not say all of a call."""
    if step.at is not None or call.attn_bias is not None or call.return_weights or call.dropout or call.sums_weights:
        return True
    if call.rules is not None or call.sink_logits is not None or view.placed is not None:
        return True
    return view.kept is not None and (step.rule.window is not None or isinstance(call.heads.position, ScoreBias))


def positions_of(step: Step, view: KeyValueView) -> Positions:
    """Positions of the queries of a step and of the keys of its view."""
    return Positions(view.first, view.start, view.end, step.past_lengths, step.rule.causal, step.rule.window)


def _distance_bias(scheme: ScoreBias, heads: int, step: Step, view: KeyValueView) -> DistanceBias:
    """Slopes of ALiBi, or a table of every distance of the call at which the numbers of another scheme differ."""
    if type(scheme) is ALiBi:
        return DistanceBias(slopes=scheme.slopes)
    low, high = _distances(step.rule, step, view)
    reach = scheme.reach
    if reach is not None:
        low, high = max(low, reach[0]), min(high, reach[1])
        low = min(low, high)

    def make() -> Tensor:
        distance = torch.arange(low, high + 1, device="cpu").unsqueeze(0)
        bias = scheme.bias_for(distance, torch.float32)
        # As beside a mask, one head or one distance may stand for all of them.
        bias = bias.reshape(bias.shape[-3:]).expand(heads, 1, distance.shape[1])
        return bias.squeeze(1).float().contiguous()

    once = step.once_in_call if scheme.learned else step.once
    return DistanceBias(table=once(("distances", scheme, low, high), make), first=low)


def _distances(rule: Rule, step: Step, view: KeyValueView) -> tuple[int, int]:
    """The least and the largest distance from a query to a key that it may see."""
    last = max(step.past_lengths) + step.width - 1
    low = 0 if rule.causal else min(step.past_lengths) - max(view.end) + 1
    high = last - (0 if view.sink_key is not None else min(view.start))
    if rule.window is not None:
        high = min(high, max(rule.window - 1, rule.max_sink_distance or 0))
    return low, max(high, low)
