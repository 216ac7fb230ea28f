"""Contents of one layer's cache, one immutable value: its own tokens, and the projected source of cross-attention."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..errors import ArgumentError
from .buffers import joined, taken
from .compress import check_observed, compressed
from .cross_kv import CrossKV
from .lengths import EMPTY, Lengths
from .policy import AnyPolicy
from .rearrange import concatenated, oldest_lengths, truncated
from .selection import selected
from .spec import CacheSpec
from .state import SelfAttentionState, check_batch, check_whole
from .static_layout import StaticLayout


class CacheContents(NamedTuple):
    """A state of self-attention, a source of cross-attention, both, or neither. Every change gives a new value."""

    state: SelfAttentionState | StaticLayout | None = None
    source: CrossKV | None = None
    reserved: int = 0
    """Slots that `reserve` asked for."""
    may_share: bool = True
    """Whether `select` may let repeated rows share their tokens: False once a call has needed each row whole."""

    # --- to be read -----------------------------------------------------------------------------------------------

    @property
    def row_lengths(self) -> Lengths:
        """How many tokens each row has seen: one entry where all rows are equal."""
        return EMPTY if self.state is None else self.state.length

    @property
    def row_cached_lengths(self) -> Lengths:
        """How many tokens of each row are cached: one entry where all rows are equal."""
        return EMPTY if self.state is None else self.state.cached_lengths()

    @property
    def is_compressed(self) -> bool:
        """True if tokens count at other positions than their own, since `compress` dropped some before them."""
        return isinstance(self.state, SelfAttentionState) and self.state.kept is not None

    @property
    def is_observed(self) -> bool:
        """True if queries or attention weights are kept for the policy of a budget."""
        return isinstance(self.state, SelfAttentionState) and self.state.observed is not None

    @property
    def like(self) -> Tensor | None:
        """Some of the keys, or none of them, for their rows, dtype and device; None where there is nothing yet."""
        if self.state is not None:
            buffers = self.state.buffers
            return buffers.key if buffers.coding is None else buffers.coding.decoded_key(buffers.key[:, :, :0])
        return None if self.source is None else self.source.like

    @property
    def kinds(self) -> tuple[bool, bool]:
        """Whether there are own tokens, and whether there is a source."""
        return self.state is not None, self.source is not None

    @property
    def batch(self) -> int | None:
        """How many rows there are; None where there is nothing yet."""
        like = self.like
        return None if like is None else like.shape[0]

    def check_batch(self, batch: int) -> None:
        """Raises ShapeError where `batch` rows cannot continue what is cached."""
        if self.state is not None:
            check_batch(self.state.buffers, batch)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, for positions after a compression, and for what a budget observes."""
        own = 0 if self.state is None else self.state.nbytes
        return own + (0 if self.source is None else self.source.nbytes)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the keys and values of the cached tokens."""
        own = 0
        if self.state is not None:
            buffers = self.state.buffers
            own = self.state.num_tokens * buffers.key.shape[1] * buffers.slot_bytes
        return own + (0 if self.source is None else sum(tensor.nbytes for tensor in self.source.tensors))

    def in_order(self, *, values: bool) -> Tensor | None:
        """Keys, or values, [B, G, cached_length, D] in order of position, else those of the source.

        None where there is nothing. Views where rows are equal, no sink is evicted and no prefix is shared; rows of
        different lengths are zero-filled.
        """
        state = self.ordered_state
        if state is None:
            return None if self.source is None else self.source.keys_and_values()[values]
        buffers = state.buffers
        tensor, sinks = (buffers.value, buffers.sink_value) if values else (buffers.key, buffers.sink_key)
        count = state.length - state.start
        if state.prefix is None:
            main = taken(tensor, state.start - state.offset, count, max(count))
        else:
            main = state.with_prefix(state.prefix, max(state.length), values=values)
        evicted = state.evicted_sinks()
        if sinks is not None and max(evicted) > 0:
            main = joined(sinks[:, :, : max(evicted)], evicted, main, count, max(state.cached_lengths()))
        if buffers.coding is None:
            return main
        return buffers.coding.decoded_value(main) if values else buffers.coding.decoded_key(main)

    # --- to be changed --------------------------------------------------------------------------------------------

    @property
    def ordered_state(self) -> SelfAttentionState | None:
        """The state in order of position: a copy of one that is laid out for compiled steps."""
        return self.state.in_order() if isinstance(self.state, StaticLayout) else self.state

    @property
    def whole_state(self) -> SelfAttentionState | None:
        """The same with every row's tokens next to each other: a copy where rows share a prefix."""
        state = self.ordered_state
        return None if state is None else state.whole()

    @property
    def oldest_lengths(self) -> Lengths:
        """The length of each row that `truncated` reaches back to."""
        state = self.ordered_state
        return EMPTY if state is None else oldest_lengths(state)

    def truncated(self, lengths: Lengths) -> "CacheContents":
        """Without the newest tokens of each row, down to the oldest lengths or more; a source stays as it is."""
        state = self.ordered_state
        return self if state is None else self._replace(state=truncated(state, lengths))

    def selected(self, chosen: Sequence[int]) -> "CacheContents":
        """These rows, in this order, of both."""
        before, state, reserved = self.ordered_state, None, self.reserved
        if before is not None:
            state = selected(before, chosen, share=self.may_share and before.part is None)
            if before.prefix is None and state.prefix is not None:
                # Rows have slots for their own tokens alone from now on.
                reserved = max(reserved - min(state.offset), 0)
        source = None if self.source is None else self.source.selected(chosen)
        return self._replace(state=state, source=source, reserved=reserved)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "CacheContents":
        """Every tensor replaced by what `change` makes of it."""
        state = self.ordered_state
        state = None if state is None else state.mapped(change)
        return self._replace(state=state, source=None if self.source is None else self.source.mapped(change))

    def compressed(self, keep: int, by: AnyPolicy, spec: CacheSpec) -> "CacheContents":
        """With at most `keep` tokens of each row, those of the highest scores; a source stays as it is."""
        state = self.whole_state
        if state is None:
            return self
        check_whole(state, "compress")
        check_observed(by, state.observed)
        if max(state.cached_lengths()) <= keep:
            return self
        ordered = self._replace(state=state, reserved=0)
        keys, values = ordered.in_order(values=False), ordered.in_order(values=True)
        if keys is None or values is None:
            raise RuntimeError("compressed: expected keys and values of a state")
        return ordered._replace(state=compressed(state, (keys, values), keep, by, spec))

    def forked(self) -> "CacheContents":
        """The same tokens for a second cache: the one that writes first copies them into buffers of its own."""
        state = self.ordered_state
        if state is None:
            return self._replace(reserved=0)
        if state.buffers.lease is not None:
            state.buffers.lease.share(max(state.slot(state.length)))
        return self._replace(state=state._replace(version=object()), reserved=0)

    @classmethod
    def concatenated(cls, every: "Sequence[CacheContents]", rows: Sequence[int], spec: CacheSpec) -> "CacheContents":
        """The rows of all in one batch, so many `rows` of each; those without tokens are of length 0.

        A source that not all have kept is left out, to be projected anew. Raises as `concatenated` of states, and
        ArgumentError where it cannot be projected.
        """
        sources = [contents.source for contents in every if contents.source is not None]
        if 0 < len(sources) < len(every):
            if any(source.kv is None for source in sources):
                raise ArgumentError("caches: expected all to have a source, as others have, got one that has none")
            sources = []
        known = [contents.whole_state for contents in every]
        for state in known:
            if state is not None:
                check_whole(state, "join")
        like = next((contents.like for contents in every if contents.state is not None), None)
        if like is None:
            return cls(source=CrossKV.concatenated(sources) if sources else None)
        states = [
            _without_tokens(like, count, spec) if state is None else state
            for state, count in zip(known, rows, strict=True)
        ]
        return cls(concatenated(states, spec), CrossKV.concatenated(sources) if sources else None)


def _without_tokens(like: Tensor, rows: int, spec: CacheSpec) -> SelfAttentionState:
    """The state of so many rows before their first token, for keys like these [B, G, S, D]."""
    none = like.new_empty(rows, like.shape[1], 0, like.shape[3])
    return SelfAttentionState.empty(none, spec.num_sinks, spec.coding(like.dtype))
