"""Static layout of a conversation for compiled steps: buffers of fixed shape, and every count in a tensor.

Python numbers would make the compiler compile anew for each token. Here a token at position `p` lies in slot `p`
modulo the capacity, so a window wraps around in its buffer; readers use positions, not slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..masks import NO_TOKEN, Rule
from ..tracing import is_compiling
from .buffers import KVBuffers, changed, empty_slots, picked
from .lease import Lease
from .lengths import EMPTY, Lengths
from .spec import CacheSpec, window_limit
from .state import SelfAttentionState
from .step import Step


class StaticLayout(NamedTuple):
    """Keys and values [B, G, C, D] by position modulo C, the sinks [B, G, n, D], and counts of each row [B, 1].

    The counts are those of `SelfAttentionState`, under the same names. Compiled steps write into all of these tensors.
    """

    buffers: KVBuffers
    stored_at: Tensor
    start_at: Tensor
    length_at: Tensor
    window: int | None

    @classmethod
    def of(cls, state: SelfAttentionState, spec: CacheSpec) -> "StaticLayout":
        """The tokens of a state, in buffers of their own."""
        # A window that a call has fixed needs slots for what `truncate` may need again, as one that was given does.
        slots = 0 if state.window is None else window_limit(state.window)
        capacity = max(spec.room(max(state.cached_lengths()), 0, None), slots)
        batch = state.buffers.key.shape[0]
        length, stored = (numbers.expand(batch).column() for numbers in (state.length, state.stored))
        stored = torch.maximum(stored, length - capacity)
        position = _positions(length, capacity)
        index = position - state.offset.column()
        with torch.inference_mode(False), torch.no_grad():
            key, value = (picked(t, index, position >= stored) for t in state.buffers.tensors[:2])
            sinks = [sinks.clone() for sinks in state.buffers.tensors[2:]]
        start = state.start.expand(batch).column()
        device = state.buffers.key.device
        stored, start, length = (
            changed(lambda t: mark_static_address(t.to(device).clone()), t) for t in (stored, start, length)
        )
        buffers = KVBuffers.of(map(mark_static_address, (key, value, *sinks)), None, state.buffers.coding)
        return cls(buffers, stored, start, length, state.window)

    @property
    def stored(self) -> Lengths:
        """The first position of each row that still lies in its buffer."""
        return Lengths.of(self.stored_at.flatten().tolist())

    @property
    def start(self) -> Lengths:
        """The first position of each row that is cached beside the sinks."""
        return Lengths.of(self.start_at.flatten().tolist())

    @property
    def length(self) -> Lengths:
        """How many tokens each row has seen."""
        return Lengths.of(self.length_at.flatten().tolist())

    def cached_lengths(self) -> Lengths:
        """How many tokens of each row are cached."""
        cached, sinks = self.length - self.start, self.buffers.sink_key
        return cached if sinks is None else cached + self.start.minimum(sinks.shape[2])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor of keys and values."""
        return self.buffers.tensors

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self.buffers.nbytes

    @property
    def num_tokens(self) -> int:
        """Cached tokens of all rows."""
        return sum(self.cached_lengths().expand(self.buffers.key.shape[0]))

    def in_order(self) -> SelfAttentionState:
        """The same tokens in order of position, in buffers of their own."""
        stored, start, length = self.stored, self.start, self.length
        count = length - stored
        position = stored.column() + torch.arange(max(count), device="cpu")
        valid = position < length.column()
        capacity = self.buffers.capacity
        tensors = []
        for tensor in self.buffers.tensors[:2]:
            fresh = empty_slots(tensor, capacity)
            with torch.no_grad():
                fresh[:, :, : max(count)] = picked(tensor, (position % capacity), valid)
            tensors.append(fresh)
        tensors += [changed(Tensor.clone, sinks) for sinks in self.buffers.tensors[2:]]
        buffers = KVBuffers.of(tensors, Lease(object()), self.buffers.coding)
        return SelfAttentionState.compact(buffers, stored, start, length, self.window)

    # --- for compiled steps: tensors alone --------------------------------------------------------------------------

    def plan(self, tokens: Step, rule: Rule, expanding_context: bool | None) -> Step:
        """The step of a compiled call: positions are known to the device alone."""
        at = self.length_at + torch.arange(tokens.tokens, device=tokens.device)
        return Step(
            rule,
            tokens.batch,
            tokens.tokens,
            past_lengths=EMPTY,
            new_lengths=tokens.new_lengths,
            device=tokens.device,
            at=at,
            expanding_context=expanding_context,
        )

    def write(self, key: Tensor, value: Tensor, at: Tensor, rule: Rule, max_length: int) -> None:
        """Appends a call's keys and values [B, G, L, D] at positions `at` [B, L]."""
        capacity, window, tokens_given = self.buffers.capacity, rule.window, at.shape[1]
        after = self.length_at + tokens_given
        start = self.start_at if window is None else torch.maximum(self.start_at, after - window)
        # A device assert: a compiled step cannot ask the device. Nothing is written where it fails.
        cached = after - start
        if self.buffers.sink_key is not None:
            cached = cached + start.clamp(max=self.buffers.sink_key.shape[2])
        fits = (cached <= max_length).all()
        torch._assert_async(fits, "max_cache_length: the cache is full; clear() it, or build it larger")
        row = torch.arange(key.shape[0], device=key.device).unsqueeze(-1)
        if self.buffers.coding is not None:
            key, value = self.buffers.coding.encoded(key, value)
        sinks = self.buffers.sink_key, self.buffers.sink_value
        for buffer, sink, tokens in zip((self.buffers.key, self.buffers.value), sinks, (key, value), strict=True):
            buffer[row, :, at % capacity] = tokens.transpose(1, 2)
            if sink is not None:
                column = torch.arange(sink.shape[2], device=key.device) - self.length_at
                new = tokens.take_along_dim(column.clamp(0, tokens_given - 1)[:, None, :, None], 2)
                new_lengths = (column >= 0) & (column < tokens_given)
                sink.copy_(new.where(new_lengths[:, None, :, None], sink))
        self.stored_at.copy_(torch.maximum(self.stored_at, after - capacity))
        self.start_at.copy_(start)
        self.length_at.copy_(after)

    def update(self, key: Tensor, value: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
        """Appends tokens [B, G, L, D] to each row, and gives the whole buffers [B, G, C, D]."""
        at = self.length_at + torch.arange(key.shape[2], device=key.device)
        self.write(key, value, at, Rule(True), max_length)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """The numbers in all slots, [B, G, C, D] each."""
        buffers = self.buffers
        pair = buffers.key, buffers.value
        return pair if buffers.coding is None else buffers.coding.decoded(*pair)

    def sinks(self) -> tuple[Tensor, Tensor] | None:
        """The numbers of the sinks, [B, G, n, D] each, where there are any."""
        buffers = self.buffers
        if buffers.sink_key is None or buffers.sink_value is None:
            return None
        pair = buffers.sink_key, buffers.sink_value
        return pair if buffers.coding is None else buffers.coding.decoded(*pair)

    def key_positions(self, start: Tensor) -> Tensor:
        """int64 [B, C]: the position of the token in each slot; NO_TOKEN where it is before `start` [B, 1]."""
        position = _positions(self.length_at, self.buffers.capacity)
        return position.where(position >= start, NO_TOKEN)


def compiled_layout(state: SelfAttentionState | StaticLayout | None) -> StaticLayout | None:
    """The state itself, where it is laid out for the step that is being compiled now; None in any other step."""
    return state if isinstance(state, StaticLayout) and is_compiling() else None


def mark_static_address(tensor: Tensor) -> Tensor:
    """The tensor itself, marked for compiled steps as one whose address does not change.

    CUDA graphs (`torch.compile(mode="reduce-overhead")`) then read and write it in place; they refuse steps that write
    into any other tensor, and copy what they read of them.
    """
    torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor


def _positions(length: Tensor, capacity: int) -> Tensor:
    """The newest position below `length` [B, 1] of each slot, int64 [B, C]; below zero where there is none yet."""
    slot = torch.arange(capacity, device=length.device)
    return length - 1 - (length - 1 - slot) % capacity
