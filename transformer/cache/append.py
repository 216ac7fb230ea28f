"""Appending of new tokens to a state: in place where that is safe, by moving or joining where it is not."""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from .buffers import KVBuffers, empty_slots, joined, taken, write
from .key_value_view import KeyValueView
from .lease import Lease
from .lengths import Lengths
from .spec import CacheSpec, window_limit
from .state import SelfAttentionState, start_after
from .step import Step

logger = logging.getLogger(__name__)

Appended = tuple[KeyValueView, SelfAttentionState]
"""The keys and values that the queries of a call may look at, and the state after it."""


def appended(
    state: SelfAttentionState, key: Tensor, value: Tensor, step: Step, spec: CacheSpec, reserved: int
) -> Appended:
    """The view of this call's queries, and the state after it; `state` itself stays as it is.

    A state with a prefix is for calls without a window, in which no gradients are recorded.
    """
    window, after, start = step.rule.window, step.total_lengths, start_after(state, step)
    fixed_window = state.window or window
    if torch.is_grad_enabled() or (window is not None and step.width > window):
        return _append_joined(state, key, value, step, spec, reserved)
    state = _with_room(state, step, spec, reserved)
    buffers, end = state.buffers, state.slot(state.length)
    write(buffers.key, key, end, step.new_lengths, step)
    write(buffers.value, value, end, step.new_lengths, step)
    first = min(state.slot(state.start))
    columns = max(state.slot(after)) - first
    _write_sinks(buffers, key, value, step)
    sink_key, sink_value = _sinks_in_view(buffers, state.start, step)
    keys, values = buffers.key.narrow(2, first, columns), buffers.value.narrow(2, first, columns)
    view = KeyValueView(
        keys,
        values,
        state.offset + first,
        state.start,
        after,
        sink_key,
        sink_value,
        kept=state.kept,
        prefix=state.prefix,
    )
    return view, state._replace(start=start, length=after, window=fixed_window, version=object(), observed=None)


def appends_beside_prefix(step: Step) -> bool:
    """Whether rows that share a prefix keep it in this call: its tokens carry no graph, and are not evicted."""
    return step.rule.window is None and not torch.is_grad_enabled()


def whole_before(state: SelfAttentionState, step: Step, spec: CacheSpec) -> SelfAttentionState:
    """The state without a prefix, with room for the new tokens of a step."""
    needed = max(state.cached_lengths() + step.new_lengths)
    return state.whole(spec.room(needed, 0, step.rule.window))


def window_moved(state: SelfAttentionState, tokens: int, spec: CacheSpec) -> SelfAttentionState:
    """The state of a window with room for so many tokens more, in fresh buffers where there is none."""
    window, before = spec.window_size, state.buffers.capacity
    if window is None or tokens > window or max(state.slot(state.length)) + tokens <= before:
        return state
    fresh = moved(state, spec.room(max(state.length - state.start) + tokens, before, window))
    slots, nbytes = fresh.buffers.capacity, fresh.buffers.nbytes
    logger.debug("moved: before a call, %d slots a row (before: %d), %d bytes", slots, before, nbytes)
    return fresh


def moved(state: SelfAttentionState, capacity: int, since: Lengths | None = None) -> SelfAttentionState:
    """The tokens from `since` on (default: `start`) at the front of fresh buffers of `capacity` slots, detached."""
    since = state.start if since is None else since
    count = state.length - since
    first, width = state.slot(since), max(count)
    tensors = []
    for tensor in state.buffers.tensors[:2]:
        fresh = empty_slots(tensor, capacity)
        if width:
            with torch.no_grad():
                fresh[:, :, :width] = taken(tensor, first, count, width)
        tensors.append(fresh)
    for sinks in state.buffers.tensors[2:]:
        fresh = empty_slots(sinks, sinks.shape[2])
        with torch.no_grad():
            fresh.copy_(sinks)
        tensors.append(fresh)
    version, kept = object(), state.kept
    if kept is not None and kept.is_evicted(since):
        kept = None
    buffers = KVBuffers.of(tensors, Lease(version), state.buffers.coding)
    return state._replace(buffers=buffers, offset=since, stored=since, version=version, kept=kept)


def _with_room(state: SelfAttentionState, step: Step, spec: CacheSpec, reserved: int) -> SelfAttentionState:
    """The state itself where the new tokens may follow in place, else the same tokens in fresh buffers; its lease is
    taken."""
    buffers, window, lease = state.buffers, step.rule.window, state.buffers.lease
    cached = state.length - state.start
    needed = max(cached + step.new_lengths)
    if state.prefix is None:
        slots = spec.room(needed, buffers.capacity, window, reserved)
    else:
        # Growing even where there is a maximum: rows that share their tokens are to take few bytes.
        slots = replace(spec, max_length=None).room(needed, buffers.capacity, None, reserved)
        if spec.max_length is not None:
            slots = max(needed, min(slots, spec.max_length - min(state.offset)))
    too_large = window is not None and buffers.capacity > max(slots, window_limit(window))
    end = state.slot(state.length)
    if too_large or lease is None or max(end + step.new_lengths) > buffers.capacity or not lease.acquire(state.version):
        event = _event(state, slots)
        fresh = moved(state, slots)
        if fresh.buffers.lease is not None:
            fresh.buffers.lease.acquire(fresh.version)
        _log(event, cached, buffers, fresh.buffers)
        return fresh
    uniform = state.offset.uniform and state.length.uniform and step.new_lengths.uniform
    if not uniform and not lease.zero_beyond:
        _clear_after(buffers, end)
        lease.zero_beyond = True
    return state


def _event(state: SelfAttentionState, slots: int) -> str:
    """Why tokens move to a buffer of so many slots."""
    buffers = state.buffers
    if buffers.capacity == 0:
        return "allocated"
    if slots > buffers.capacity:
        return "grown"
    newest = buffers.lease is not None and buffers.lease.holder is state.version
    return "compacted" if newest else "copied, since others may read the buffer before"


def _log(event: str, cached: Lengths, before: KVBuffers, after: KVBuffers) -> None:
    text = "%s: %d tokens cached before the call, %d slots a row (before: %d), %d bytes (before: %d)"
    logger.debug(text, event, max(cached), after.capacity, before.capacity, after.nbytes, before.nbytes)


def _clear_after(buffers: KVBuffers, end: Lengths) -> None:
    """Zeros in all slots from each row's `end` on, which no row reads: truncated tokens may lie there."""
    first = min(end)
    unused = torch.arange(first, buffers.capacity, device="cpu") >= end.column()
    unused = unused.to(buffers.key.device)[:, None, :, None]
    for tensor in (buffers.key, buffers.value):
        tensor[:, :, first:].masked_fill_(unused, 0.0)


def _append_joined(
    state: SelfAttentionState, key: Tensor, value: Tensor, step: Step, spec: CacheSpec, reserved: int
) -> Appended:
    """Cached and new tokens in tensors of their own: while gradients are recorded, which the cache then carries, and
    for a chunk that is longer than its window, of which only the last tokens stay."""
    buffers, start, after, window = state.buffers, start_after(state, step), step.total_lengths, step.rule.window
    cached = state.length - state.start
    width, first = max(cached + step.new_lengths), state.slot(state.start)
    keys, values = (
        joined(taken(tensor, first, cached, max(cached)), cached, tokens, step.new_lengths, width)
        for tensor, tokens in zip((buffers.key, buffers.value), (key, value), strict=True)
    )
    grad_enabled = torch.is_grad_enabled()
    # Tokens that a window evicts in this call stay stored, so that `truncate` can undo it; not so in a long chunk.
    stored = start if window is not None and step.width > window else state.start
    stored_lengths = after - stored
    tensors = []
    for tensor in (keys, values):
        kept = taken(tensor, stored - state.start, stored_lengths, max(stored_lengths))
        if grad_enabled:
            # A copy where a part would keep the whole alive, or where the tokens may be a tensor of the caller.
            own = kept.shape[2] == tensor.shape[2] and tensor is not key and tensor is not value
            tensors.append(kept if own else kept.clone())
        else:
            fresh = empty_slots(tensor, spec.room(max(stored_lengths), 0, window, reserved))
            fresh[:, :, : kept.shape[2]] = kept
            tensors.append(fresh)
    tensors += _joined_sinks(buffers, key, value, step)
    kept_buffers = KVBuffers.of(tensors, None if grad_enabled else Lease(), buffers.coding)
    if not grad_enabled:
        _log("compacted" if buffers.capacity else "allocated", cached, buffers, kept_buffers)
    sink_key, sink_value = _sinks_in_view(kept_buffers, state.start, step)
    view = KeyValueView(keys, values, state.start, state.start, after, sink_key, sink_value, kept=state.kept)
    after_call = SelfAttentionState.compact(kept_buffers, stored, start, after, state.window or window)
    return view, after_call._replace(kept=state.kept)


def _new_sinks(buffers: KVBuffers, step: Step) -> Lengths | None:
    """How many of its new tokens each row keeps as sinks; None where no row keeps any."""
    if buffers.sink_key is None or min(step.past_lengths) >= buffers.sink_key.shape[2]:
        return None
    missing = (buffers.sink_key.shape[2] - step.past_lengths).maximum(0)
    return missing.minimum(step.new_lengths)


def _write_sinks(buffers: KVBuffers, key: Tensor, value: Tensor, step: Step) -> None:
    new_sinks = _new_sinks(buffers, step)
    if new_sinks is None or buffers.sink_key is None or buffers.sink_value is None:
        return
    end = step.past_lengths.minimum(buffers.sink_key.shape[2])
    write(buffers.sink_key, key, end, new_sinks, step)
    write(buffers.sink_value, value, end, new_sinks, step)


def _joined_sinks(buffers: KVBuffers, key: Tensor, value: Tensor, step: Step) -> list[Tensor]:
    new_sinks = _new_sinks(buffers, step)
    sinks = []
    for old, tokens in zip(buffers.tensors[2:], (key, value), strict=False):
        kept, number = old, old.shape[2]
        if new_sinks is not None:
            kept = joined(old, step.past_lengths.minimum(number), tokens, new_sinks, number)
        if not torch.is_grad_enabled():
            fresh = empty_slots(old, number)
            fresh.copy_(kept)
            kept = fresh
        sinks.append(kept)
    return sinks


def _sinks_in_view(buffers: KVBuffers, start: Lengths, step: Step) -> tuple[Tensor | None, Tensor | None]:
    """The sinks, where some query meets one outside of its window."""
    window = step.rule.window
    if buffers.sink_key is None or buffers.sink_value is None:
        return None, None
    if max(start) == 0 and (window is None or max(step.total_lengths) <= window):
        return None, None
    number = min(buffers.sink_key.shape[2], max(step.total_lengths))
    return buffers.sink_key[:, :, :number], buffers.sink_value[:, :, :number]
