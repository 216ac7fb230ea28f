"""Storages of keys and values: buffers of slots, how tokens are written into them, and how much room they get.

A slot is written once while anybody can read it. Only the state that has the `lease` of a storage may append in place,
and it writes into dead space beyond its own tokens; whoever else holds the storage moves to a fresh one first. A write
that failed leaves the lease taken, so what it left behind is never read.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .lengths import Lengths
from .step import Step

SLACK = 64
"""Slots beyond the need at the first allocation, and beyond twice a window."""


@dataclass(slots=True, eq=False)
class Storage:
    """Buffers `key`, `value` [B, G, C, D] of C slots, and those of the sinks [B, G, num_sinks, D] where there are any.

    `lease` has the ticket of the one state that may append in place; it is empty while a write is under way, and after
    a failed one. (The ticket, not the state: a cycle would keep buffers alive until the next garbage collection.)
    Tensors that are not `owned` (they carry a graph, or share memory with others) never give one. `clean` says that
    slots beyond that state's tokens are zero, as rows of different lengths need: theirs are read, with weight 0.
    """

    key: Tensor
    value: Tensor
    sink_key: Tensor | None = None
    sink_value: Tensor | None = None
    owned: bool = field(default=False, kw_only=True)
    clean: bool = field(default=True, kw_only=True)
    lease: list[object] = field(default_factory=list, kw_only=True)
    forked: int = field(default=0, kw_only=True)
    """Slots before this one may be read by a fork."""
    open: list[int] = field(default_factory=list, kw_only=True)
    """The same for each open transaction."""

    @property
    def readable(self) -> int:
        """Slots before this one may be read by others than the lease's state: they are never rewritten."""
        return max(self.forked, *self.open) if self.open else self.forked

    def leased(self, ticket: object) -> bool:
        """Whether the state of this ticket may append in place."""
        return ticket in self.lease

    def take(self, ticket: object) -> bool:
        """Takes the lease, if it is this state's: of several threads one gets it."""
        lease = self.lease
        try:
            return ticket in lease and lease.pop() is ticket
        except IndexError:
            return False

    @property
    def capacity(self) -> int:
        """Slots of each row, sinks aside."""
        return self.key.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every buffer."""
        if self.sink_key is None or self.sink_value is None:
            return self.key, self.value
        return self.key, self.value, self.sink_key, self.sink_value

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return allocated(self.tensors)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Storage":
        """A storage of the changed tensors, not owned."""
        return Storage(*(changed(change, tensor) for tensor in self.tensors))


def allocated(tensors: Iterable[Tensor]) -> int:
    """Bytes that these tensors keep alive: whole storages, also where a tensor shows only a part, and each once."""
    alive = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(alive.values())


def room(needed: int, capacity: int, window: int | None) -> int:
    """Slots to allocate for `needed` after a buffer of `capacity`: doubling, for a full window its limit."""
    grown = capacity if needed <= capacity else max(2 * capacity, needed + SLACK)
    if window is None:
        return grown
    limit = window_limit(window)
    return max(needed, limit if needed >= window else min(grown, limit))


def most_room(length: int, window: int | None) -> int:
    """The most slots that `room` ever gives on the way to `length` tokens, however they are cut into calls.

    Before a window is full, a buffer of `length - 1` slots may just have to double, or the first call needs all.
    """
    if window is not None and length >= window:
        return window_limit(window)
    return max(length + SLACK, 2 * (length - 1))


def fixed_room(max_length: int, window: int | None) -> int:
    """Slots of a buffer that is allocated once, for at most `max_length` tokens held."""
    return max_length if window is None else max(max_length, window_limit(window))


def window_limit(window: int) -> int:
    """Slots that a window ever needs: a full one, a chunk as long, and slack between two moves to the front."""
    return 2 * window + SLACK


def changed(change: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`change(tensor)` as a tensor that may be kept: an ordinary one also inside inference mode."""
    if not torch.is_inference_mode_enabled():
        return change(tensor)
    with torch.inference_mode(False), torch.no_grad():
        return change(tensor)


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
    return row.to(step.device), source.to(step.device)


def taken(tensor: Tensor, first: Lengths, count: Lengths, width: int) -> Tensor:
    """Each row's `count` slots from `first` on, left-aligned in [B, G, width, D], zeros after; keeps the graph."""
    if first.uniform and count.uniform and count[0] == width:
        return tensor[:, :, first[0] : first[0] + width]
    slot = torch.arange(width, device="cpu")
    valid = slot < count.column()
    return picked(tensor, first.column() + slot, valid)


def joined(held: Tensor, held_count: Lengths, tokens: Tensor, count: Lengths, width: int) -> Tensor:
    """Each row's `held_count` slots of `held` and then `count` of its `tokens`, left-aligned; keeps the graph."""
    if held.shape[2] == 0:
        return tokens
    both = torch.cat((held, tokens), 2)
    if held_count.uniform and count.uniform and held_count[0] == held.shape[2] and count[0] == tokens.shape[2]:
        return both
    slot = torch.arange(width, device="cpu")
    old, new = held_count.column(), count.column()
    index = torch.where(slot < old, slot, slot - old + held.shape[2])
    return picked(both, index, slot < old + new)


def picked(tensor: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Slots `index` [1 or B, width] of `tensor` [B, G, S, D], zeros where not `valid`; keeps the graph."""
    index = index.where(valid, 0).to(tensor.device)[:, None, :, None]
    return tensor.take_along_dim(index, 2).masked_fill(~valid.to(tensor.device)[:, None, :, None], 0.0)
