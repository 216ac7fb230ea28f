"""Store of conversations by their tokens: the longest known prefix of a prompt, bounded in bytes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..cache import KVCache
from ..cache.stored import allocated_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A conversation of one row or several, with the tokens that each row has read, int64 [n] on the host."""

    cache: KVCache
    ids: tuple[Tensor, ...]

    @property
    def oldest_length(self) -> int:
        """The length that `truncate` reaches back to."""
        return max(max(part.contents.oldest_lengths) for part in self.cache.parts())

    def covers(self, other: "Entry") -> bool:
        """True if each row of another entry is a prefix that can be had from this one."""
        if self.oldest_length > min(len(ids) for ids in other.ids):
            return False
        return all(any(common_length(ids, own) == len(ids) for own in self.ids) for ids in other.ids)


class Match(NamedTuple):
    """A prefix of a prompt that a row of an entry begins with."""

    entry: Entry
    row: int
    length: int

    def conversation(self, rows: int = 1) -> KVCache:
        """A conversation of so many rows that have read the prefix, which they share; the entry stays as it is."""
        chosen, fork = [self.row] * rows, self.entry.cache.fork()
        if len(self.entry.ids) > 1 or rows > 1:
            fork.select(chosen)
        return fork.truncate(self.length)


class PrefixStore:
    """Conversations, the least recently used first, of at most `max_bytes` bytes together."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: tuple[Entry, ...] = ()

    def __len__(self) -> int:
        return sum(len(entry.ids) for entry in self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all of them; those that several share are counted once."""
        return _bytes_of(self._entries)

    def clear(self) -> None:
        """Forgets all of them."""
        self._entries = ()

    def longest(self, ids: Tensor) -> Match | None:
        """The longest prefix of `ids` int64 [n] that is known, without the last token, which is to be read."""
        found = None
        for entry in self._entries:
            for row, own in enumerate(entry.ids):
                length = min(common_length(ids, own), len(ids) - 1)
                if length > (found.length if found else 0) and length >= entry.oldest_length:
                    found = Match(entry, row, length)
        return found

    def use(self, used: Iterable[Entry]) -> None:
        """Marks entries as the most recently used ones."""
        recent = {id(entry) for entry in used}
        kept = [entry for entry in self._entries if id(entry) not in recent]
        self._entries = (*kept, *(entry for entry in self._entries if id(entry) in recent))

    def add(self, cache: KVCache, ids: Sequence[Tensor]) -> None:
        """Adds a conversation, to which no other code writes; those that it covers go, and the least recently used."""
        new = Entry(cache, tuple(ids))
        entries = [*(entry for entry in self._entries if not new.covers(entry)), new]
        while entries and _bytes_of(entries) > self._max_bytes:
            del entries[0]
        self._entries = tuple(entries)


def common_length(one: Tensor, other: Tensor) -> int:
    """How many tokens two sequences int64 [n] begin with in common."""
    length = min(len(one), len(other))
    differing = (one[:length] != other[:length]).nonzero()
    return int(differing[0]) if len(differing) else length


def _bytes_of(entries: Iterable[Entry]) -> int:
    return allocated_bytes(part.contents for entry in entries for part in entry.cache.parts())
