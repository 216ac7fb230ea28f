"""Buffers of keys and values: slots for tokens, the lease to append to them in place, and tensors taken out of them.

A slot is written once while anybody can read it. Only the newest state of a buffer appends in place, into slots beyond
its own tokens; every other state copies first. A write that failed leaves the lease taken, so what it wrote is never
read.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import Coding
from .lease import Lease
from .lengths import Lengths
from .step import Step


@dataclass(frozen=True, slots=True, eq=False)
class KVBuffers:
    """Buffers `key`, `value` [B, G, C, D] of C slots, and those of the sinks [B, G, num_sinks, D] where there are any.

    With a `coding` they contain records instead of numbers, uint8 [B, G, C, bytes]. `lease` is None for tensors that
    are never written: they carry a graph, or share memory with others.
    """

    key: Tensor
    value: Tensor
    sink_key: Tensor | None = None
    sink_value: Tensor | None = None
    lease: Lease | None = None
    coding: Coding | None = None

    @classmethod
    def of(cls, tensors: Iterable[Tensor], lease: Lease | None = None, coding: Coding | None = None) -> "KVBuffers":
        """Buffers of these tensors, in the order of `tensors`."""
        key, value, *sinks = tensors
        sink_key, sink_value = sinks or (None, None)
        return cls(key, value, sink_key, sink_value, lease, coding)

    @property
    def capacity(self) -> int:
        """Slots of each row, sinks aside."""
        return self.key.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every buffer: keys, values, and those of the sinks."""
        if self.sink_key is None or self.sink_value is None:
            return self.key, self.value
        return self.key, self.value, self.sink_key, self.sink_value

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which keys come in and are read."""
        return self.key.dtype if self.coding is None else self.coding.dtype

    @property
    def slot_bytes(self) -> int:
        """Bytes of one key and its value, of one head."""
        return self.key.shape[3] * self.key.element_size() + self.value.shape[3] * self.value.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return allocated(self.tensors)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "KVBuffers":
        """Buffers of the changed tensors, without a lease."""
        coding = None if self.coding is None else mapped_coding(change, self.coding, self.key)
        return KVBuffers.of((changed(change, tensor) for tensor in self.tensors), None, coding)


def allocated(tensors: Iterable[Tensor]) -> int:
    """Bytes that these tensors keep alive: whole storages, also where a tensor is only a part of one, each once."""
    alive = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(alive.values())


def changed(change: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`change(tensor)` as a tensor that may be kept: an ordinary one also inside inference mode."""
    if not torch.is_inference_mode_enabled():
        return change(tensor)
    with torch.inference_mode(False), torch.no_grad():
        return change(tensor)


def mapped_coding(change: Callable[[Tensor], Tensor], coding: Coding, stored: Tensor) -> Coding:
    """The coding of records after a change, which may be a cast: they then are read in another dtype."""
    numbers = stored.new_empty((*stored.shape[:2], 0, coding.head_dim), dtype=coding.dtype)
    return coding.read_as(changed(change, numbers).dtype)


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor itself, or an ordinary copy of one that was made in inference mode, so that it may be kept."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


def empty_slots(like: Tensor, capacity: int, batch: int | None = None) -> Tensor:
    """Zeros [B, G, capacity, D]: an ordinary tensor also inside inference mode, so that it may be kept."""
    rows, groups, _, head_dim = like.shape
    with torch.inference_mode(False), torch.no_grad():
        return torch.zeros(batch or rows, groups, capacity, head_dim, dtype=like.dtype, device=like.device)


def write(target: Tensor, tokens: Tensor, slot: Lengths, count: Lengths, step: Step) -> None:
    """Writes the first `count` of each row's `tokens` [B, G, width, D] into `target` from that row's `slot` on."""
    if slot.uniform and count.uniform:
        number = count[0]
        target.narrow(2, slot[0], number).copy_(tokens if number == tokens.shape[2] else tokens[:, :, :number])
        return
    row, source = step.once(("tokens of rows", count), lambda: _tokens_of_rows(count, step))
    slots = step.once(("slots of rows", slot, count), lambda: slot.expand(step.batch).column(step.device))
    target[row, :, slots.squeeze(-1)[row] + source] = tokens[row, :, source]


def _tokens_of_rows(count: Lengths, step: Step) -> tuple[Tensor, Tensor]:
    counts = count.expand(step.batch).column()
    row, source = (torch.arange(step.width, device="cpu") < counts).nonzero(as_tuple=True)
    return row.to(step.device, non_blocking=True), source.to(step.device, non_blocking=True)


def taken(tensor: Tensor, first: Lengths, count: Lengths, width: int) -> Tensor:
    """Each row's `count` slots from `first` on, left-aligned in [B, G, width, D], zeros after; keeps the graph."""
    if first.uniform and count.uniform and count[0] == width:
        return tensor[:, :, first[0] : first[0] + width]
    slot = torch.arange(width, device="cpu")
    valid = slot < count.column()
    return picked(tensor, first.column() + slot, valid)


def joined(cached: Tensor, cached_count: Lengths, tokens: Tensor, count: Lengths, width: int) -> Tensor:
    """Each row's `cached_count` slots of `cached` and then `count` of its `tokens`, left-aligned; keeps the graph."""
    if cached.shape[2] == 0:
        return tokens
    both = torch.cat((cached, tokens), 2)
    if cached_count.uniform and count.uniform and cached_count[0] == cached.shape[2] and count[0] == tokens.shape[2]:
        return both
    slot = torch.arange(width, device="cpu")
    old, new = cached_count.column(), count.column()
    index = torch.where(slot < old, slot, slot - old + cached.shape[2])
    return picked(both, index, slot < old + new)


def picked(tensor: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Slots `index` [1 or B, width] of `tensor` [B, G, S, D], zeros where not `valid`; keeps the graph."""
    if tensor.shape[2] == 0:
        return tensor.new_zeros(*tensor.shape[:2], valid.shape[1], tensor.shape[3])
    index, valid = (
        each.to(tensor.device, non_blocking=True)[:, None, :, None] for each in (index.where(valid, 0), valid)
    )
    return tensor.take_along_dim(index, 2).masked_fill(~valid, 0.0)
