"""Rearrangements of cached tokens: fewer of them, or beside those of other caches.

Each function gives a new state and leaves the one it was given as it is, and whole.
"""

from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, CacheStateError, DeviceError, DtypeError
from .buffers import KVBuffers, empty_slots, taken
from .kept import KeptTokens
from .lease import Attribute, Lease
from .lengths import EMPTY, Lengths
from .observed import Observed
from .spec import CacheSpec
from .state import SelfAttentionState


def truncated(state: SelfAttentionState, lengths: Lengths) -> SelfAttentionState:
    """The state without the tokens of each row at positions from `lengths` on; shorter rows stay as they are.

    `lengths` are `oldest_lengths` or more. Where a window has evicted tokens, the last `window` tokens of a row are
    cached again; those that calls in expanding mode had cached beyond them stay evicted.
    """
    after = state.length.minimum(lengths)
    if after == state.length:
        return state
    if state.part is not None:
        if not after.uniform:
            raise CacheStateError(
                f"length: expected one number for all rows of a sequence that ranks share, got {list(after)}"
            )
        return state._replace(version=object()).counted_to(after[0], state.part.before(after[0]))
    if state.prefix is not None:
        # Own tokens then begin where the prefix is cut.
        end, prefix = state.offset.minimum(after), state.prefix if max(after) else None
        return state._replace(length=after, offset=end, stored=end, start=end, version=object(), prefix=prefix)
    start = state.start
    if state.window is not None:
        cached = (after - state.window).maximum(state.stored)
        start = start.minimum(cached)
    return state._replace(length=after, start=start, version=object())


def lease_of_truncated(before: SelfAttentionState, after: SelfAttentionState) -> list[Attribute]:
    """The changes that let a truncated state append in place, in the buffers that it has in common with `before`.

    None unless `before` might append, and no other state reads the slots that are then written again.
    """
    lease = after.buffers.lease
    if lease is None or lease is not before.buffers.lease or lease.holder is not before.version:
        return []
    if min(after.slot(after.length)) < lease.shared:
        return []
    return [*lease.renew(after.version), (lease, "zero_beyond", False)]


def oldest_lengths(state: SelfAttentionState) -> Lengths:
    """The lengths that `truncated` reaches back to: not before a compression, and rows of which a window has evicted
    something need a whole window before it."""
    if state.prefix is not None or state.part is not None:
        return EMPTY
    if state.observed is not None:
        # Sums of attention cannot be taken back, and earlier queries are gone.
        return state.length
    first, end = (EMPTY, EMPTY) if state.kept is None else (state.kept.first, state.kept.end)
    complete = (state.stored + (state.window or 0)).maximum(end)
    batch = state.buffers.key.shape[0]
    rows = zip(*(numbers.expand(batch) for numbers in (state.stored, first, end, complete)), strict=True)
    # Where all that was kept is stored, nothing more is missing.
    oldest = Lengths.of(end if stored == first else complete for stored, first, end, complete in rows)
    return state.length.minimum(oldest)


def concatenated(states: Sequence[SelfAttentionState], spec: CacheSpec) -> SelfAttentionState:
    """The rows of all states in one batch, each with its own length; with a graph where one of them carries one.

    Raises DtypeError, DeviceError or ArgumentError where they cannot stand in one batch.
    """
    first, dtype = states[0].buffers.key, states[0].buffers.dtype
    windows = {state.window for state in states if state.window is not None}
    if len(windows) > 1:
        raise ArgumentError(f"caches: expected all to have one window, got windows {sorted(windows)}")
    for state in states:
        other = state.buffers.key
        if state.buffers.dtype != dtype:
            raise DtypeError(
                f"caches: expected all in {dtype}, as the first, got {state.buffers.dtype}; move it with to()"
            )
        if other.device != first.device:
            raise DeviceError(f"caches: expected all on {first.device}, as the first, got {other.device}; use to()")
    counts = [state.length - state.stored for state in states]
    width, window = max(max(count) for count in counts), next(iter(windows), None)
    grad_enabled = any(state.buffers.key.requires_grad for state in states)
    slots = width if grad_enabled else spec.room(width, 0, window)
    tensors = []
    for number in range(len(states[0].buffers.tensors)):
        parts = []
        for state, count in zip(states, counts, strict=True):
            tensor = state.buffers.tensors[number]
            # The first two are keys and values; sinks have slots of their own.
            parts.append(tensor if number > 1 else taken(tensor, state.slot(state.stored), count, max(count)))
        tensors.append(_stacked(parts, slots if number < 2 else parts[0].shape[2], grad_enabled))
    stored, start, length = (
        Lengths.of(chain.from_iterable(getattr(s, name).expand(s.buffers.key.shape[0]) for s in states))
        for name in ("stored", "start", "length")
    )
    buffers = KVBuffers.of(tensors, None if grad_enabled else Lease(object()), states[0].buffers.coding)
    state = SelfAttentionState.compact(buffers, stored, start, length, window)
    kept = [KeptTokens.nothing(s.buffers.key) if s.kept is None else s.kept for s in states]
    observed = Observed.concatenated(_observed(states), max(state.cached_lengths()))
    return state._replace(kept=KeptTokens.concatenated(kept), observed=observed)


def _observed(states: Sequence[SelfAttentionState]) -> list[Observed | None]:
    """What states have observed; of rows before their first token as much as others have of theirs."""
    known = next((state.observed for state in states if state.observed is not None), None)
    if known is None:
        return [None] * len(states)
    return [
        state.observed if max(state.length) else known.before_tokens(state.buffers.key.shape[0]) for state in states
    ]


def _stacked(parts: Sequence[Tensor], slots: int, grad_enabled: bool) -> Tensor:
    """The rows of all parts [B, G, C, D] in one tensor of `slots` slots, zeros where a part is shorter."""
    if grad_enabled:
        return torch.cat([F.pad(part, (0, 0, 0, slots - part.shape[2])) for part in parts])
    batch = sum(part.shape[0] for part in parts)
    fresh, row = empty_slots(parts[0], slots, batch), 0
    with torch.no_grad():
        for part in parts:
            fresh[row : row + part.shape[0], :, : part.shape[2]] = part
            row += part.shape[0]
    return fresh
