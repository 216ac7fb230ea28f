"""State of a layer's self-attention cache, and the checks of what may follow it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..codecs import Coding
from ..errors import CacheFullError, CacheStateError, DeviceError, DtypeError, ShapeError
from ..masks import NO_TOKEN
from .buffers import KVBuffers, allocated, empty_slots
from .kept import KeptTokens
from .lease import Lease
from .lengths import EMPTY, Lengths
from .observed import Observed
from .sequence_part import SequencePart
from .shared_prefix import SharedPrefix
from .step import Step


class SelfAttentionState(NamedTuple):
    """The tokens of a self-attention cache, as one immutable value. Positions and slots are different numbers.

    A row's token at position `p` lies in slot `p - offset`. Tokens at positions `start` to `length` (exclusive) are
    cached. Those from `stored` to `start` are evicted but still lie there: `truncate` may need them again. Sinks at
    positions before `start` are only in the sinks' own buffer, whose slots are their positions.

    With a `prefix` the buffers have only the tokens after it: those at positions before `offset`, which is also
    `stored` and `start`, are in the prefix. There is then no window, no sink and no graph.
    """

    buffers: KVBuffers
    offset: Lengths
    stored: Lengths
    start: Lengths
    length: Lengths
    window: int | None
    version: object
    """A different object for each state, by which the buffers' lease knows it."""
    kept: KeptTokens | None = None
    """The true positions after a compression; None where each token counts at its own."""
    observed: Observed | None = None
    """What the policy of a budget needs; None without one, and after a call without one."""
    prefix: SharedPrefix | None = None
    """The tokens that rows have in common; None where each has its own."""
    part: SequencePart | None = None
    """Which tokens of a sequence that ranks share are here; None where all of them are."""

    @classmethod
    def empty(cls, like: Tensor, num_sinks: int, coding: Coding | None = None) -> "SelfAttentionState":
        """The state without a token, for keys like these [B, G, L, D]."""
        none = like[:, :, :0]
        pair = (none, none) if coding is None else coding.encoded(none, none)
        tensors = [empty_slots(each, 0) for each in pair]
        if num_sinks:
            tensors += [empty_slots(each, num_sinks) for each in pair]
        buffers = KVBuffers.of(tensors, Lease(), coding)
        return cls(buffers, offset=EMPTY, stored=EMPTY, start=EMPTY, length=EMPTY, window=None, version=object())

    @classmethod
    def compact(
        cls, buffers: KVBuffers, stored: Lengths, start: Lengths, length: Lengths, window: int | None
    ) -> "SelfAttentionState":
        """The state of buffers of its own, in which the token at position `stored` of each row is in slot 0."""
        lease = buffers.lease
        version = object() if lease is None or lease.holder is None else lease.holder
        return cls(buffers, offset=stored, stored=stored, start=start, length=length, window=window, version=version)

    def counted_to(self, length: int, part: SequencePart) -> "SelfAttentionState":
        """The same tokens as this rank's part of a shared sequence of so many, without windows and sinks."""
        before = Lengths((length - part.count(),))
        return self._replace(offset=before, stored=before, start=before, length=Lengths((length,)), part=part)

    @property
    def tensors_beside(self) -> tuple[Tensor, ...]:
        """The tensors beside the buffers: positions of kept tokens, and what a budget observes."""
        kept = () if self.kept is None else (self.kept.positions,)
        return kept if self.observed is None else (*kept, *self.observed.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor, those of a prefix once."""
        shared = () if self.prefix is None else self.prefix.tensors
        return (*self.buffers.tensors, *shared, *self.tensors_beside)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "SelfAttentionState":
        """The same with every tensor replaced by what `change` makes of it."""
        kept = None if self.kept is None else self.kept.mapped(change)
        observed = None if self.observed is None else self.observed.mapped(change)
        prefix = None if self.prefix is None else self.prefix.mapped(change)
        return self._replace(buffers=self.buffers.mapped(change), kept=kept, observed=observed, prefix=prefix)

    def evicted_sinks(self) -> Lengths:
        """How many sinks of each row are only in the sinks' own buffer."""
        sinks = self.buffers.sink_key
        return EMPTY if sinks is None else self.start.minimum(sinks.shape[2])

    def cached_lengths(self) -> Lengths:
        """How many tokens of each row are cached."""
        if self.start == EMPTY or self.prefix is not None:
            return self.length
        cached = self.length - self.start
        return cached if self.buffers.sink_key is None else cached + self.evicted_sinks()

    def counted_positions(self) -> Tensor:
        """int64 [1 or B, S]: where each cached token counts, in order; NO_TOKEN after the last one of a shorter row."""
        evicted, cached = self.evicted_sinks(), self.cached_lengths()
        column = torch.arange(max(cached), device="cpu")
        position = column.where(column < evicted.column(), column + (self.start - evicted).column())
        position = position.where(column < cached.column(), NO_TOKEN)
        return position.to(self.buffers.key.device, non_blocking=True)

    def columns_of(self, counted: Tensor) -> Tensor:
        """int64 [1 or B, S]: columns, in order, of the tokens that count at `counted`; below zero of those not here."""
        evicted, start, length = (
            numbers.column(counted.device) for numbers in (self.evicted_sinks(), self.start, self.length)
        )
        column = counted.where(counted < evicted, counted - start + evicted)
        return column.where(counted < length, -1)

    def true_positions(self) -> Tensor:
        """int64 [B, G, S]: the position of each cached token in order, of each key/value head."""
        counted, key = self.counted_positions(), self.buffers.key
        if self.kept is None:
            return counted.unsqueeze(1).expand(*key.shape[:2], -1)
        return self.kept.true_positions(counted)

    def slot(self, position: Lengths) -> Lengths:
        """The slots of the tokens at these positions."""
        return position - self.offset

    def whole(self, capacity: int = 0) -> "SelfAttentionState":
        """The same tokens without a prefix, for what knows none: a copy, of so many slots a row at least."""
        if self.prefix is None:
            return self
        slots = max(capacity, *self.length)
        pair = (self.with_prefix(self.prefix, slots, values=values) for values in (False, True))
        buffers = KVBuffers.of(pair, Lease(object()), self.buffers.coding)
        return SelfAttentionState.compact(buffers, EMPTY, EMPTY, self.length, self.window)

    def with_prefix(self, prefix: SharedPrefix, capacity: int, *, values: bool) -> Tensor:
        """Keys, or values, [B, G, capacity, D] of a state with this prefix: a copy in order of position."""
        own = self.buffers.value if values else self.buffers.key
        return prefix.followed_by(own, self.offset, self.length - self.offset, capacity, values=values)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, those of a prefix once, and for what stands beside them."""
        return allocated(self.tensors)

    @property
    def num_tokens(self) -> int:
        """Cached tokens of all rows, those of a prefix once."""
        batch, prefix = self.buffers.key.shape[0], self.prefix
        if prefix is None:
            return sum(self.cached_lengths().expand(batch))
        own, shared = self.length - self.offset, prefix.lengths(self.offset)
        return sum(own.expand(batch)) + sum(shared.expand(prefix.key.shape[0]))


def check_whole(state: SelfAttentionState, needed_by: str) -> None:
    """Raises CacheStateError where this rank has only a part of a shared sequence."""
    if state.part is not None:
        raise CacheStateError(
            f"kv_cache: expected all tokens in it, for {needed_by}, got this rank's part of a sequence that "
            f"{len(state.part.runs)} ranks share; read the tokens outside of share_sequence instead"
        )


def check_batch(buffers: KVBuffers, batch: int) -> None:
    """Raises ShapeError where `batch` rows cannot continue what is cached."""
    rows = buffers.key.shape[0]
    if batch != rows:
        raise ShapeError(
            f"x: expected {rows} rows, as in the kv_cache, got {batch}; "
            "set kv_cache = None to begin anew, or use one cache per batch"
        )


def check_continues(state: SelfAttentionState, key: Tensor, step: Step) -> None:
    """Raises ShapeError, CacheStateError, DtypeError or DeviceError where new keys do not continue what is cached."""
    cached, dtype = state.buffers.key, state.buffers.dtype
    check_batch(state.buffers, key.shape[0])
    check_whole(state, "a call outside of share_sequence")
    if step.past_lengths != state.length and Lengths.of(step.past_lengths) != state.length:
        raise CacheStateError(
            f"step: made for row lengths {step.past_lengths}, but this module's kv_cache has {state.length}; "
            "layers of one model must have seen the same tokens"
        )
    if dtype != key.dtype:
        raise DtypeError(
            f"x: its keys are {key.dtype}, but the kv_cache holds {dtype}; "
            f"move the conversation with kv_cache.to(dtype={key.dtype}), or set kv_cache = None"
        )
    if cached.device != key.device:
        raise DeviceError(
            f"x: its keys are on {key.device}, but the kv_cache is on {cached.device}; "
            f"move the conversation with kv_cache.to({str(key.device)!r}), or set kv_cache = None"
        )


def check_unrecorded(key: Tensor, value: Tensor) -> None:
    """Raises CacheStateError where gradients are recorded for new keys and values, which records cannot carry."""
    if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
        raise CacheStateError(
            "cache_dtype: expected a call in which no gradients are recorded, since stored records carry none; "
            "call within torch.no_grad() or torch.inference_mode(), or set cache_dtype=None"
        )


def check_room(state: SelfAttentionState, step: Step, max_length: int) -> None:
    """Raises CacheFullError where more than `max_length` tokens would be cached after the step."""
    after = max(state._replace(start=start_after(state, step), length=step.total_lengths).cached_lengths())
    if after > max_length:
        raise CacheFullError(
            f"max_cache_length: expected at most {max_length} tokens in the cache, which holds "
            f"{max(state.cached_lengths())}, got {after} with this call of {step.width}; clear() it, slide "
            "(expanding_context=False), or build the module with a larger max_cache_length"
        )


def start_after(state: SelfAttentionState, step: Step) -> Lengths:
    """The first position of each row that is still cached, sinks aside, after the step: a window evicts those before.

    A row without a new token in this step stays as it is, whatever the other rows do.
    """
    window = step.rule.window
    if window is None:
        return state.start
    slid = state.start.maximum(step.total_lengths - window)
    if min(step.new_lengths) > 0:
        return slid
    every = (numbers.expand(step.batch) for numbers in (state.start, slid, step.new_lengths))
    return Lengths.of(after if new_length else before for before, after, new_length in zip(*every, strict=True))
