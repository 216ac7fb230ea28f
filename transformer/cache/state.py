"""Everything that a layer's cache of self-attention is, and what may follow it."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CacheFullError, CacheStateError, DeviceError, DtypeError, ShapeError
from .lengths import EMPTY, Lengths
from .step import Step
from .storage import Storage, empty_slots


class SelfAttentionState(NamedTuple):
    """Everything that a cache of self-attention is, as one immutable value. Positions and slots are apart.

    A row's token at position `p` lies in slot `p - offset`; it is held from position `start` to `length` (exclusive),
    and lies there still, let go, from `stored` on: what `truncate` may need again. Sinks at positions before `start`
    are held only in the sinks' own buffer, whose slots are their positions.
    """

    storage: Storage
    offset: Lengths
    stored: Lengths
    start: Lengths
    length: Lengths
    window: int | None
    ticket: object
    """Its own for each state: what the storage's lease is compared with."""

    @classmethod
    def empty(cls, like: Tensor, num_sinks: int) -> "SelfAttentionState":
        """Nothing seen yet, for keys like these [B, G, L, D]."""
        buffers = [empty_slots(like, 0), empty_slots(like, 0)]
        if num_sinks:
            buffers += [empty_slots(like, num_sinks), empty_slots(like, num_sinks)]
        return cls(Storage(*buffers, owned=True), EMPTY, EMPTY, EMPTY, EMPTY, None, object())

    def evicted_sinks(self) -> Lengths:
        """How many sinks of each row live on only in the sinks' own buffer."""
        sinks = self.storage.sink_key
        return EMPTY if sinks is None else self.start.minimum(sinks.shape[2])

    def cached_lengths(self) -> Lengths:
        """How many tokens each row holds."""
        return self.length - self.start + self.evicted_sinks()

    def slot(self, position: Lengths) -> Lengths:
        """Where the tokens at these positions lie."""
        return position - self.offset


def check_batch(storage: Storage, batch: int) -> None:
    """Raises ShapeError where `batch` rows cannot continue what is held."""
    held = storage.key.shape[0]
    if batch != held:
        raise ShapeError(
            f"x: expected {held} rows, as in the kv_cache, got {batch}; "
            "set kv_cache = None to begin anew, or use one cache per batch"
        )


def check_no_recompute() -> None:
    """Raises CacheStateError inside backward, where activation checkpointing calls once more."""
    if torch._C._current_graph_task_id() != -1:
        raise CacheStateError(
            "kv_cache: a recompute inside backward would append the same tokens twice; "
            "use none (use_kv_cache = False) where activations are checkpointed"
        )


def check_continues(state: SelfAttentionState, key: Tensor, step: Step) -> None:
    """Raises ShapeError, CacheStateError, DtypeError or DeviceError where new keys do not continue what is held."""
    held = state.storage.key
    check_batch(state.storage, key.shape[0])
    if step.past_lengths != state.length and Lengths.of(step.past_lengths) != state.length:
        raise CacheStateError(
            f"step: made for row lengths {step.past_lengths}, but this module's kv_cache has {state.length}; "
            "layers of one model must have seen the same tokens"
        )
    if held.dtype != key.dtype:
        raise DtypeError(
            f"x: its keys are {key.dtype}, but the kv_cache holds {held.dtype}; "
            f"move the conversation with kv_cache.to(dtype={key.dtype}), or set kv_cache = None"
        )
    if held.device != key.device:
        raise DeviceError(
            f"x: its keys are on {key.device}, but the kv_cache is on {held.device}; "
            f"move the conversation with kv_cache.to({str(key.device)!r}), or set kv_cache = None"
        )


def check_room(state: SelfAttentionState, step: Step, max_length: int) -> None:
    """Raises CacheFullError where more than `max_length` tokens would be held after the step."""
    held = max(state._replace(start=start_after(state, step), length=step.total_lengths).cached_lengths())
    if held > max_length:
        raise CacheFullError(
            f"max_cache_length: the cache may hold {max_length} tokens, holds {max(state.cached_lengths())}, and "
            f"this call of {step.width} would make it {held}; clear() it, slide "
            "(expanding_context=False), or build the module with a larger max_cache_length"
        )


def start_after(state: SelfAttentionState, step: Step) -> Lengths:
    """The first position of each row that stays in the buffer after the step: a window lets go what it has left.

    A row that gains no token in this step is left as it is, whatever its neighbours do.
    """
    window = step.rule.window
    if window is None:
        return state.start
    slid = state.start.maximum(step.total_lengths - window)
    if min(step.new_lengths) > 0:
        return slid
    every = (numbers.expand(step.batch) for numbers in (state.start, slid, step.new_lengths))
    return Lengths.of(after if new_lengths else before for before, after, new_lengths in zip(*every, strict=True))
