"""Part of a shared sequence in one rank's cache: which tokens each rank has."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64
"""New tokens that one rank keeps before the next rank's turn comes: few, so that ranks have nearly equally many, and
not one, so that a part is a few runs of positions."""


class SequencePart(NamedTuple):
    """The tokens that each rank caches, as runs of positions. All rows have the same.

    A state counts its own tokens as if they were the newest: with K of them, at positions `length - K` to `length`, as
    if a window had evicted all others. So what appends, moves and selects rows works as it is. Their true positions are
    in order too, and are read here.

    Example: 2 ranks have read 8 tokens. Rank 0 has those at 0, 1, 6 and 7, rank 1 those from 2 to 5. Then `runs` is
    ((range(0, 2), range(6, 8)), (range(2, 6),)), and on both ranks tokens count at 4 to 7.
    """

    rank: int
    runs: tuple[tuple[range, ...], ...]

    @classmethod
    def empty(cls, rank: int, ranks: int) -> "SequencePart":
        """No token on any rank."""
        return cls(rank, ((),) * ranks)

    def is_of(self, rank: int, ranks: int) -> bool:
        """True if it is the part of this rank, of so many."""
        return (self.rank, len(self.runs)) == (rank, ranks)

    def count(self, rank: int | None = None) -> int:
        """How many tokens a rank has, by default this one."""
        return sum(map(len, self.runs[self.rank if rank is None else rank]))

    def followed_by(self, new: Sequence[Sequence[range]]) -> "SequencePart":
        """With the new tokens of each rank, which come after all others."""
        return self._replace(runs=tuple(map(_appended, self.runs, new)))

    def before(self, length: int) -> "SequencePart":
        """Without the tokens at positions from `length` on."""
        return self._replace(runs=tuple(_cut(runs, length) for runs in self.runs))

    def positions(self) -> Tensor:
        """int64 [K]: the true positions of this rank's tokens, in order, on the host."""
        runs = [torch.arange(run.start, run.stop, device="cpu") for run in self.runs[self.rank]]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64, device="cpu")

    def joined(self, parts: Tensor) -> Tensor:
        """All tokens [..., S, D] in order of position, from those of each rank [ranks, ..., K, D]."""
        pieces = []
        for rank, runs in enumerate(self.runs):
            begin = 0
            for run in runs:
                pieces.append((run.start, parts[rank].narrow(-2, begin, len(run))))
                begin += len(run)
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda each: each[0])], -2)


def dealt(past: int, length: int, ranks: int) -> tuple[tuple[range, ...], ...]:
    """The ranks' runs of `length` new tokens after `past`, all of which every rank is given: blocks in turn."""
    runs: list[list[range]] = [[] for _ in range(ranks)]
    begin, end = past, past + length
    while begin < end:
        stop = min((begin // BLOCK + 1) * BLOCK, end)
        runs[begin // BLOCK % ranks].append(range(begin, stop))
        begin = stop
    return tuple(map(tuple, runs))


def _appended(runs: tuple[range, ...], new: Sequence[range]) -> tuple[range, ...]:
    """The runs of one rank and its new ones; a run that goes on is one run."""
    for run in new:
        if runs and runs[-1].stop == run.start:
            runs = (*runs[:-1], range(runs[-1].start, run.stop))
        elif len(run):
            runs = (*runs, run)
    return runs


def _cut(runs: tuple[range, ...], length: int) -> tuple[range, ...]:
    """The positions before `length`."""
    return tuple(range(run.start, min(run.stop, length)) for run in runs if run.start < length)
