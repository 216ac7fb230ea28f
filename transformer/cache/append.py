"""How new tokens join those that are held: in place where that is safe, by moving or joining where it is not."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import rows
from .context import Context
from .rows import Rows
from .state import State, start_after
from .step import Step
from .storage import Storage, empty_slots, joined, taken, window_limit, write

Capacity = Callable[[int, int, int | None], int]
"""(slots needed, slots there were, window) to slots to allocate."""


def appended(state: State, key: Tensor, value: Tensor, step: Step, capacity: Capacity) -> tuple[Context, State]:
    """The context of this call's queries, and the state after it; `state` itself stays as it is, and whole."""
    window, after, start = step.rule.window, step.after, start_after(state, step)
    fixed_window = state.window or window
    if torch.is_grad_enabled() or (window is not None and step.width > window):
        return _append_joined(state, key, value, step, start, fixed_window, capacity)
    state = _with_room(state, step, capacity)
    storage, end = state.storage, state.slot(state.length)
    storage.tip = None
    write(storage.key, key, end, step.gained, step)
    write(storage.value, value, end, step.gained, step)
    first = min(state.slot(state.start))
    columns = max(state.slot(after)) - first
    _write_sinks(storage, key, value, step)
    sinks = _sinks_in_context(storage, state.start, step)
    keys, values = storage.key.narrow(2, first, columns), storage.value.narrow(2, first, columns)
    context = Context(keys, values, rows.plus(state.offset, (first,)), state.start, after, *sinks)
    return context, State(storage, state.offset, start, after, fixed_window, object())


def moved(state: State, capacity: int) -> State:
    """The same tokens at the front of fresh buffers of `capacity` slots, detached."""
    count = rows.minus(state.length, state.start)
    first, width = state.slot(state.start), max(count)
    buffers = []
    for tensor in state.storage.tensors[:2]:
        fresh = empty_slots(tensor, capacity)
        with torch.no_grad():
            fresh[:, :, :width] = taken(tensor, first, count, width)
        buffers.append(fresh)
    for sinks in state.storage.tensors[2:]:
        fresh = empty_slots(sinks, sinks.shape[2])
        with torch.no_grad():
            fresh.copy_(sinks)
        buffers.append(fresh)
    return State(Storage(*buffers, owned=True), state.start, state.start, state.length, state.window, object())


def _with_room(state: State, step: Step, capacity: Capacity) -> State:
    """The state itself where the new tokens may follow in place, else the same tokens where they may."""
    storage, window = state.storage, step.rule.window
    held = rows.minus(state.length, state.start)
    slots = capacity(max(rows.plus(held, step.gained)), storage.capacity, window)
    if storage.tip is not state.ticket or (window is not None and storage.capacity > max(slots, window_limit(window))):
        return moved(state, slots)
    ragged = max(len(state.offset), len(state.length), len(step.gained)) > 1
    if ragged and not storage.clean:
        return moved(state, slots)
    if max(rows.plus(state.slot(state.length), step.gained)) <= storage.capacity:
        return state
    first = state.slot(state.start)
    if slots == storage.capacity and not ragged and held[0] + step.gained[0] <= first[0]:
        return _moved_to_front(state, first[0], held[0])
    return moved(state, slots)


def _moved_to_front(state: State, first: int, count: int) -> State:
    """The same tokens at the front of the same buffers: into dead space, so that `state` stays whole."""
    storage = state.storage
    storage.tip, storage.clean = None, False
    for tensor in (storage.key, storage.value):
        tensor[:, :, :count] = tensor[:, :, first : first + count]
    return state._replace(offset=state.start, ticket=object())


def _append_joined(
    state: State,
    key: Tensor,
    value: Tensor,
    step: Step,
    start: Rows,
    fixed_window: int | None,
    capacity: Capacity,
) -> tuple[Context, State]:
    """Held and new tokens as tensors of their own: the way that carries a graph, and the way of a chunk that is longer
    than its window, of which only the last tokens stay."""
    storage, after = state.storage, step.after
    held = rows.minus(state.length, state.start)
    width, first = max(rows.plus(held, step.gained)), state.slot(state.start)
    keys, values = (
        joined(taken(tensor, first, held, max(held)), held, tokens, step.gained, width)
        for tensor, tokens in zip((storage.key, storage.value), (key, value), strict=True)
    )
    recorded = torch.is_grad_enabled()
    stays = rows.minus(after, start)
    buffers = []
    for tensor in (keys, values):
        kept = taken(tensor, rows.minus(start, state.start), stays, max(stays))
        if recorded:
            # A copy where a part would keep the whole alive, or where the tokens may be somebody else's tensor.
            own = kept.shape[2] == tensor.shape[2] and tensor is not key and tensor is not value
            buffers.append(kept if own else kept.clone())
        else:
            fresh = empty_slots(tensor, capacity(max(stays), 0, step.rule.window))
            fresh[:, :, : kept.shape[2]] = kept
            buffers.append(fresh)
    buffers += _joined_sinks(storage, key, value, step)
    kept_storage = Storage(*buffers, owned=not recorded)
    context = Context(
        keys, values, state.start, state.start, after, *_sinks_in_context(kept_storage, state.start, step)
    )
    return context, State(kept_storage, start, start, after, fixed_window, object())


def _sinks_gained(storage: Storage, step: Step) -> Rows | None:
    """How many of its new tokens each row keeps as sinks; None where no row keeps any."""
    if storage.sink_key is None or min(step.before) >= storage.sink_key.shape[2]:
        return None
    missing = rows.at_least(rows.minus((storage.sink_key.shape[2],), step.before), (0,))
    return rows.at_most(missing, step.gained)


def _write_sinks(storage: Storage, key: Tensor, value: Tensor, step: Step) -> None:
    gained = _sinks_gained(storage, step)
    if gained is None or storage.sink_key is None or storage.sink_value is None:
        return
    before = rows.at_most(step.before, (storage.sink_key.shape[2],))
    write(storage.sink_key, key, before, gained, step)
    write(storage.sink_value, value, before, gained, step)


def _joined_sinks(storage: Storage, key: Tensor, value: Tensor, step: Step) -> list[Tensor]:
    gained = _sinks_gained(storage, step)
    sinks = []
    for old, tokens in zip(storage.tensors[2:], (key, value), strict=False):
        kept, number = old, old.shape[2]
        if gained is not None:
            kept = joined(old, rows.at_most(step.before, (number,)), tokens, gained, number)
        if not torch.is_grad_enabled():
            fresh = empty_slots(old, number)
            fresh.copy_(kept)
            kept = fresh
        sinks.append(kept)
    return sinks


def _sinks_in_context(storage: Storage, start: Rows, step: Step) -> tuple[Tensor | None, Tensor | None]:
    """The sinks, where some query meets one outside of its window."""
    window = step.rule.window
    if storage.sink_key is None or storage.sink_value is None:
        return None, None
    if max(start) == 0 and (window is None or max(step.after) <= window):
        return None, None
    number = min(storage.sink_key.shape[2], max(step.after))
    return storage.sink_key[:, :, :number], storage.sink_value[:, :, :number]
