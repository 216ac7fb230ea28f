"""Sequence that ranks share: the interface of the ranks, the layout of their parts, and what one call knows of it.

With n ranks a run of tokens is cut into 2n chunks of equal length, and rank r has chunk r and chunk 2n - 1 - r, one
after the other: in causal order a late chunk costs more than an early one, and each such pair costs the same.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .lengths import Lengths


class SharedSequence(ABC):
    """The ranks that share the sequences of some modules' calls. Nothing here knows of process groups."""

    rank: int
    """This one, from 0 on."""
    ranks: int
    """How many there are."""

    @abstractmethod
    def covers(self, module: object) -> bool:
        """True if the calls of this attention module are over a shared sequence."""

    @abstractmethod
    def gathered(self, tensor: Tensor) -> Tensor:
        """[ranks, ...]: the tensor [...] of each rank, all of one shape. Gradients of all ranks are summed, and each
        rank gets those of its own tensor."""

    @abstractmethod
    def check_alike(self, numbers: Mapping[str, int], equal: Tensor | None) -> None:
        """Raises RanksError, on every rank, unless all ranks give the same numbers, and tensors `equal` in content."""


class SequenceLayout(NamedTuple):
    """The parts of `length` tokens on so many ranks."""

    length: int
    ranks: int

    def chunk(self, number: int) -> range:
        """The tokens of one of the 2n chunks, which differ in length by one at most."""
        chunks = 2 * self.ranks
        return range(number * self.length // chunks, (number + 1) * self.length // chunks)

    def chunks_of(self, rank: int) -> tuple[range, range]:
        """The tokens of one rank's two chunks."""
        return self.chunk(rank), self.chunk(2 * self.ranks - 1 - rank)

    def part_length(self, rank: int) -> int:
        """How many tokens one rank has."""
        return sum(map(len, self.chunks_of(rank)))

    def taken(self, whole: Tensor, rank: int, dim: int = 1) -> Tensor:
        """The part of one rank, from `whole` with all tokens in dimension `dim`."""
        return torch.cat([whole.narrow(dim, chunk.start, len(chunk)) for chunk in self.chunks_of(rank)], dim)

    def joined(self, parts: Tensor, dim: int = 1) -> Tensor:
        """All tokens in order, from the parts [ranks, ...] with each rank's tokens in dimension `dim`, counted without
        that of the ranks; a part may have columns more."""
        first, second = [], []
        for rank, part in enumerate(parts.unbind()):
            early, late = self.chunks_of(rank)
            first.append(part.narrow(dim, 0, len(early)))
            second.append(part.narrow(dim, len(early), len(late)))
        return torch.cat((*first, *reversed(second)), dim)

    def gathered(self, sequence: SharedSequence, part: Tensor, dim: int = 1) -> Tensor:
        """All tokens in order, on every rank, from this rank's part."""
        longest = max(map(self.part_length, range(self.ranks)))
        return self.joined(sequence.gathered(lengthened(part, longest, dim)), dim)


def lengthened(tensor: Tensor, length: int, dim: int) -> Tensor:
    """The tensor with zeros after its entries of one dimension, `length` in all."""
    missing = length - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = [missing if place == dim % tensor.ndim else size for place, size in enumerate(tensor.shape)]
    return torch.cat((tensor, tensor.new_zeros(shape)), dim)


class SequenceCall(NamedTuple):
    """One call over a shared sequence, as its step carries it."""

    sequence: SharedSequence
    length: int
    """New tokens of each row on all ranks together."""
    is_part: bool
    """True if the call is given this rank's part of them; False if it is given all of them, as every other rank is."""
    real: Tensor | None = None
    """bool [B, L] of this rank's part, true for a real token; None where all are. Padding is on the right."""
    row_lengths: Lengths | None = None
    """Real tokens of each row on all ranks together, where there is padding."""

    @property
    def layout(self) -> SequenceLayout:
        """The parts of the ranks."""
        return SequenceLayout(self.length, self.sequence.ranks)

    @property
    def chunks(self) -> tuple[range, range]:
        """The tokens of this rank's two chunks, counted from the first new one."""
        return self.layout.chunks_of(self.sequence.rank)

    def positions(self, past: int) -> Tensor:
        """int64 [1, L]: positions of this rank's part after so many tokens of each row, on the host."""
        runs = [torch.arange(past + chunk.start, past + chunk.stop, device="cpu") for chunk in self.chunks]
        return torch.cat(runs).unsqueeze(0)
