"""Self-attention of a flat run row by row: each row's queries over its own keys, as if it were alone.

Nothing is computed for padding, and no mask tells rows apart. This serves the CPU, where a call of a kernel costs
little; a device that waits for launches is given all rows at once.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..cache import CacheContents, FlatRun, KeyValueView, Lengths, Step, uncached_view
from ..kernels import tuning, use_float32
from ..positions import ScoreBias
from .blockwise import BlockwiseAttention
from .call import AttentionCall
from .rules import RulesOverView


def use_rows(call: AttentionCall, step: Step) -> bool:
    """True if the rows of this flat run are faster one by one, and nothing is asked for that is laid out in rows."""
    run = step.run
    if run is None or step.batch == 1 or call.return_weights or call.attn_bias is not None or not call.x.is_cpu:
        return False
    if step.rule.num_sinks or (call.layer is not None and torch.is_grad_enabled()):
        return False
    if call.last_queries or call.sums_weights:
        return False
    if call.layer is not None and call.layer.contents.is_compressed:
        return False
    return run.given.shape[0] >= step.batch * tuning.active.min_row_tokens


def attend_by_row(
    call: AttentionCall, run: FlatRun, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, CacheContents | None]:
    """Attended heads [1, H, N, D] of flat heads `query` [1, H, N, D] and `key`, `value` [1, G, N, D], and the contents
    of the cache after the call."""
    step, contents, view = call.step, None, None
    if step is None:
        raise RuntimeError("attend_by_row: expected a call with a step")
    position, window = call.heads.position, step.rule.window
    score_bias = position if isinstance(position, ScoreBias) else None
    steps = _steps_of_rows(step, run, score_bias)
    if call.layer is not None:
        view, contents = call.layer.append(run.aligned_heads(key), run.aligned_heads(value), step, beside_prefix=True)
    first, dtype = max(step.past_lengths) == 0, query.dtype
    # New tokens that are stored as records are read as they are stored.
    as_given = view is None or (first and view.coding is None)
    if as_given and first and use_float32(query, run.width):
        query, key, value = query.float(), key.float(), value.float()
    if view is None or as_given:
        # Rows that see their new tokens alone, as they lie. Split, not cut: gradients are then joined in one pass.
        keys, values = key.split_with_sizes(run.lengths, 2), value.split_with_sizes(run.lengths, 2)
        views: Iterable[KeyValueView] = [uncached_view(*each) for each in zip(keys, values, steps, strict=True)]
    else:
        views = _views_of_rows(view.decoded(), step.batch)
    # Then the kernel's own order is the whole rule.
    plain = first and score_bias is None and call.rules is None and (window is None or run.width <= window)
    kernel, causal, outputs = partial(call.heads.kernel, dropout=call.dropout), step.rule.causal, []
    for row, row_query, row_view in zip(steps, query.split_with_sizes(run.lengths, 2), views, strict=True):
        if plain and row.width:
            out, _ = kernel(row_query, row_view.key, row_view.value, causal=causal)
        elif row.width:
            rules = None if call.rules is None else RulesOverView(call.rules, row, row_view, row_query.shape[1])
            attend = BlockwiseAttention(
                call.heads.kernel, row, row_view, row_query, row_query, score_bias, rules, dropout=call.dropout
            )
            out, _ = attend()
        else:
            continue
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, 1).to(dtype).transpose(1, 2), contents


def _steps_of_rows(step: Step, run: FlatRun, score_bias: ScoreBias | None) -> list[Step]:
    """A step for each row alone. Those of a learned bias serve one call, the others whenever this step does."""
    if score_bias is None or not score_bias.learned:
        return step.once("steps of rows", partial(_rows, step, run))
    return step.once_in_call("steps of rows", lambda: [row.for_one_call() for row in _rows(step, run)])


def _rows(step: Step, run: FlatRun) -> list[Step]:
    lengths = zip(step.past_lengths.expand(step.batch), run.lengths, strict=True)
    return [Step(step.rule, 1, new, Lengths((past,)), Lengths((new,)), step.device) for past, new in lengths]


def _views_of_rows(view: KeyValueView, batch: int) -> Iterator[KeyValueView]:
    """The keys and values of each row alone, without the columns that it does not use.

    A prefix that it shares is copied to its own tokens, of one row at a time.
    """
    bounds, prefix = (
        zip(view.first.expand(batch), view.start.expand(batch), view.end.expand(batch), strict=True),
        view.prefix,
    )
    for row, (first, start, end) in enumerate(bounds):
        key, value = (x[row : row + 1].narrow(2, start - first, end - start) for x in (view.key, view.value))
        if prefix is not None:
            number, own = prefix.rows[row], (key, value)
            both = zip(prefix.tensors, own, strict=True)
            key, value = (torch.cat((shared[number : number + 1, :, :start], x), 2) for shared, x in both)
            start = 0
        yield KeyValueView(key, value, Lengths((start,)), Lengths((start,)), Lengths((end,)))
