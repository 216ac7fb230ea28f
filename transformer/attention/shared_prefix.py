"""Self-attention of rows that share a prefix: over the prefix once for all of them, over each row's own tokens, merged.

The queries of all rows that share a prefix are rows of one product, so each of its keys is read once
(Hydragen, arXiv 2402.05099).
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import KeyValueView, Lengths, SharedPrefix, Step, on_device
from ..codecs import Coding
from ..kernels import AttentionState, Kernel, Positions, attention_state, merge_attention_states, serves_parts, tuning
from ..positions import ScoreBias
from .by_positions import needs_more, positions_of
from .call import AttentionCall


def attends_beside_prefix(call: AttentionCall, step: Step, view: KeyValueView, query: Tensor) -> bool:
    """Whether scores depend on queries and keys alone, and nothing is asked for but the output."""
    return not needs_more(call, step, view) and not isinstance(call.heads.position, ScoreBias) and serves_parts(query)


def attend_beside_prefix(kernel: Kernel, step: Step, view: KeyValueView, query: Tensor) -> Tensor:
    """Attended heads [B, H, width, D] of queries that see the whole prefix of their row, and its own tokens."""
    prefix, coding = view.prefix, view.coding
    if prefix is None:
        raise RuntimeError("attend_beside_prefix: expected a view with a prefix")
    own = attention_state(kernel, query, view.key, view.value, positions_of(step, view), coding)
    readers = step.once(("readers", prefix.rows), partial(_readers, prefix, query.device))
    shared = _over_prefix(kernel, query, prefix, readers, prefix.lengths(view.first), coding)
    return merge_attention_states((shared.out, own.out), (shared.lse, own.lse)).to(query.dtype)


class Readers(NamedTuple):
    """Rows of the batch by the row of a prefix that they have."""

    places: list[Tensor]
    """int64 [n] of each row of the prefix."""
    back: Tensor
    """int64 [B]: the place of each row of the batch among all of these."""


def _readers(prefix: SharedPrefix, device: torch.device) -> Readers | None:
    """The rows that read a prefix; None for equally many of each, next to each other, as samples and beams stand."""
    number, rows = prefix.key.shape[0], prefix.rows
    each = len(rows) // number
    if len(rows) == each * number and all(row == place // each for place, row in enumerate(rows)):
        return None
    order = sorted(range(len(rows)), key=rows.__getitem__)
    places = [on_device([place for place in order if rows[place] == row], device) for row in range(number)]
    return Readers(places, on_device(sorted(range(len(order)), key=order.__getitem__), device))


def _over_prefix(
    kernel: Kernel,
    query: Tensor,
    prefix: SharedPrefix,
    readers: Readers | None,
    ends: Lengths,
    coding: Coding | None,
) -> AttentionState:
    """Attention of all queries over the prefix of their row."""
    if readers is None:
        return _folded(kernel, query, prefix.tensors, ends, coding)
    states = []
    for row, (places, end) in enumerate(zip(readers.places, ends.expand(len(readers.places)), strict=True)):
        of_row = prefix.key[row : row + 1], prefix.value[row : row + 1]
        states.append(_folded(kernel, query.index_select(0, places), of_row, (end,), coding))
    return AttentionState(*(torch.cat(each).index_select(0, readers.back) for each in zip(*states, strict=True)))


def _folded(
    kernel: Kernel, query: Tensor, tensors: tuple[Tensor, Tensor], ends: tuple[int, ...], coding: Coding | None
) -> AttentionState:
    """Queries [R * n, H, L, D], n rows for each of the R rows of keys and values [R, G, P, D], or records of them."""
    (batch, heads, length, head_dim), (number, groups, _, _) = query.shape, tensors[0].shape
    rows, per_group, states = batch // number, heads // groups, []
    at_once = _rows_at_once(rows, per_group * length)
    by_prefix, positions = (
        query.view(number, rows, groups, per_group, length, head_dim),
        Positions((0,), (0,), ends, (0,), False),
    )
    for begin in range(0, rows, at_once):
        # [R, n, G, ...] as [R, G, n, ...]: rows that share keys are further query heads of theirs.
        folded = by_prefix.narrow(1, begin, min(at_once, rows - begin)).transpose(1, 2)
        out, lse = attention_state(kernel, folded.reshape(number, -1, length, head_dim), *tensors, positions, coding)
        states.append(
            AttentionState(out.view(folded.shape).transpose(1, 2), lse.view(folded.shape[:-1]).transpose(1, 2))
        )
    out, lse = states[0] if len(states) == 1 else (torch.cat(each, 1) for each in zip(*states, strict=True))
    return AttentionState(out.reshape(query.shape), lse.reshape(query.shape[:3]))


def _rows_at_once(rows: int, query_rows: int) -> int:
    """Rows of the batch whose queries the compiled kernel takes together; all where one has too many for it."""
    most = tuning.active.max_compiled_query_rows // query_rows
    return rows if most == 0 else min(rows, most)
