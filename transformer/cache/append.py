"""Appending of new tokens to those that are held: in place where that is safe, by moving or joining where it is not."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from .key_value_view import KeyValueView
from .lengths import Lengths
from .state import SelfAttentionState, start_after
from .step import Step
from .storage import Storage, empty_slots, joined, taken, window_limit, write

logger = logging.getLogger(__name__)

Capacity = Callable[[int, int, int | None], int]
"""(slots needed, slots there were, window) to slots to allocate."""


def appended(
    state: SelfAttentionState, key: Tensor, value: Tensor, step: Step, capacity: Capacity
) -> tuple[KeyValueView, SelfAttentionState]:
    """The context of this call's queries, and the state after it; `state` itself stays as it is, and whole."""
    window, after, start = step.rule.window, step.total_lengths, start_after(state, step)
    fixed_window = state.window or window
    if torch.is_grad_enabled() or (window is not None and step.width > window):
        return _append_joined(state, key, value, step, start, fixed_window, capacity)
    state = _with_room(state, step, capacity)
    storage, end = state.storage, state.slot(state.length)
    write(storage.key, key, end, step.new_lengths, step)
    write(storage.value, value, end, step.new_lengths, step)
    first = min(state.slot(state.start))
    columns = max(state.slot(after)) - first
    _write_sinks(storage, key, value, step)
    sinks = _sinks_in_context(storage, state.start, step)
    keys, values = storage.key.narrow(2, first, columns), storage.value.narrow(2, first, columns)
    context = KeyValueView(keys, values, state.offset + first, state.start, after, *sinks)
    return context, state._replace(storage=storage, start=start, length=after, window=fixed_window, ticket=object())


def moved(state: SelfAttentionState, capacity: int, since: Lengths | None = None) -> SelfAttentionState:
    """The tokens from `since` on (by default the held) at the front of fresh buffers of `capacity` slots, detached."""
    since = state.start if since is None else since
    count = state.length - since
    first, width = state.slot(since), max(count)
    buffers = []
    for tensor in state.storage.tensors[:2]:
        fresh = empty_slots(tensor, capacity)
        if width:
            with torch.no_grad():
                fresh[:, :, :width] = taken(tensor, first, count, width)
        buffers.append(fresh)
    for sinks in state.storage.tensors[2:]:
        fresh = empty_slots(sinks, sinks.shape[2])
        with torch.no_grad():
            fresh.copy_(sinks)
        buffers.append(fresh)
    ticket = object()
    storage = Storage(*buffers, owned=True, lease=[ticket])
    return state._replace(storage=storage, offset=since, stored=since, ticket=ticket)


def _with_room(state: SelfAttentionState, step: Step, capacity: Capacity) -> SelfAttentionState:
    """The state itself where the new tokens may follow in place, else the same tokens where they may; without lease."""
    storage, window = state.storage, step.rule.window
    held = state.length - state.start
    slots = capacity(max(held + step.new_lengths), storage.capacity, window)
    too_large = window is not None and storage.capacity > max(slots, window_limit(window))
    end = state.slot(state.length)
    if too_large or max(end + step.new_lengths) > storage.capacity or not storage.take(state.ticket):
        event = _event(state, slots)
        fresh = moved(state, slots)
        fresh.storage.take(fresh.ticket)
        _tell(event, held, storage, fresh.storage)
        return fresh
    ragged = not (state.offset.uniform and state.length.uniform and step.new_lengths.uniform)
    if ragged and not storage.clean:
        _clean(storage, end)
        storage.clean = True
    return state


def _event(state: SelfAttentionState, slots: int) -> str:
    """Why tokens move to a buffer of so many slots."""
    storage = state.storage
    if storage.capacity == 0:
        return "allocated"
    if slots > storage.capacity:
        return "grown"
    return "compacted" if storage.leased(state.ticket) else "copied, since others may read the buffer before"


def _tell(event: str, held: Lengths, before: Storage, after: Storage) -> None:
    text = "%s: %d tokens held before the call, %d slots a row (before: %d), %d bytes (before: %d)"
    logger.debug(text, event, max(held), after.capacity, before.capacity, after.nbytes, before.nbytes)


def _clean(storage: Storage, end: Lengths) -> None:
    """Zeros in all slots from each row's `end` on, which are dead space: what was truncated may lie there."""
    first = min(end)
    dead = torch.arange(first, storage.capacity, device="cpu") >= end.column()
    dead = dead.to(storage.key.device)[:, None, :, None]
    for tensor in (storage.key, storage.value):
        tensor[:, :, first:].masked_fill_(dead, 0.0)


def _append_joined(
    state: SelfAttentionState,
    key: Tensor,
    value: Tensor,
    step: Step,
    start: Lengths,
    fixed_window: int | None,
    capacity: Capacity,
) -> tuple[KeyValueView, SelfAttentionState]:
    """Held and new tokens as tensors of their own: the way that carries a graph, and the way of a chunk that is longer
    than its window, of which only the last tokens stay."""
    storage, after, window = state.storage, step.total_lengths, step.rule.window
    held = state.length - state.start
    width, first = max(held + step.new_lengths), state.slot(state.start)
    keys, values = (
        joined(taken(tensor, first, held, max(held)), held, tokens, step.new_lengths, width)
        for tensor, tokens in zip((storage.key, storage.value), (key, value), strict=True)
    )
    grad_enabled = torch.is_grad_enabled()
    # What a window lets go of in this call stays stored, so that the call can be taken back; not so in a long chunk.
    stored = start if window is not None and step.width > window else state.start
    stored_lengths = after - stored
    buffers = []
    for tensor in (keys, values):
        kept = taken(tensor, stored - state.start, stored_lengths, max(stored_lengths))
        if grad_enabled:
            # A copy where a part would keep the whole alive, or where the tokens may be somebody else's tensor.
            own = kept.shape[2] == tensor.shape[2] and tensor is not key and tensor is not value
            buffers.append(kept if own else kept.clone())
        else:
            fresh = empty_slots(tensor, capacity(max(stored_lengths), 0, window))
            fresh[:, :, : kept.shape[2]] = kept
            buffers.append(fresh)
    buffers += _joined_sinks(storage, key, value, step)
    kept_storage = Storage(*buffers, owned=not grad_enabled)
    if not grad_enabled:
        _tell("compacted" if storage.capacity else "allocated", held, storage, kept_storage)
    context = KeyValueView(
        keys, values, state.start, state.start, after, *_sinks_in_context(kept_storage, state.start, step)
    )
    return context, SelfAttentionState(kept_storage, stored, stored, start, after, fixed_window, object())


def _sinks_gained(storage: Storage, step: Step) -> Lengths | None:
    """How many of its new tokens each row keeps as sinks; None where no row keeps any."""
    if storage.sink_key is None or min(step.past_lengths) >= storage.sink_key.shape[2]:
        return None
    missing = (storage.sink_key.shape[2] - step.past_lengths).maximum(0)
    return missing.minimum(step.new_lengths)


def _write_sinks(storage: Storage, key: Tensor, value: Tensor, step: Step) -> None:
    new_lengths = _sinks_gained(storage, step)
    if new_lengths is None or storage.sink_key is None or storage.sink_value is None:
        return
    before = step.past_lengths.minimum(storage.sink_key.shape[2])
    write(storage.sink_key, key, before, new_lengths, step)
    write(storage.sink_value, value, before, new_lengths, step)


def _joined_sinks(storage: Storage, key: Tensor, value: Tensor, step: Step) -> list[Tensor]:
    new_lengths = _sinks_gained(storage, step)
    sinks = []
    for old, tokens in zip(storage.tensors[2:], (key, value), strict=False):
        kept, number = old, old.shape[2]
        if new_lengths is not None:
            kept = joined(old, step.past_lengths.minimum(number), tokens, new_lengths, number)
        if not torch.is_grad_enabled():
            fresh = empty_slots(old, number)
            fresh.copy_(kept)
            kept = fresh
        sinks.append(kept)
    return sinks


def _sinks_in_context(storage: Storage, start: Lengths, step: Step) -> tuple[Tensor | None, Tensor | None]:
    """The sinks, where some query meets one outside of its window."""
    window = step.rule.window
    if storage.sink_key is None or storage.sink_value is None:
        return None, None
    if max(start) == 0 and (window is None or max(step.total_lengths) <= window):
        return None, None
    number = min(storage.sink_key.shape[2], max(step.total_lengths))
    return storage.sink_key[:, :, :number], storage.sink_value[:, :, :number]
