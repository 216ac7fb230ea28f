"""Operations on a conversation of one layer or of a whole model: on all of its layers, or on none."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import ArgumentError, CacheStateError, shown
from .chosen_rows import chosen_rows
from .contents import CacheContents
from .elsewhere import Figures
from .lease import Attribute, exchange
from .lengths import EMPTY, Lengths
from .policy import AnyPolicy, check_policy, is_policy
from .spec import LARGEST_OPTION, CacheSpec

logger = logging.getLogger(__name__)


class Part(Protocol):
    """One layer of a conversation."""

    spec: CacheSpec

    @property
    def contents(self) -> CacheContents:
        """Its tokens and its source."""

    @property
    def figures(self) -> Figures:
        """Their figures, which leave them where they are."""

    def as_found(self) -> Attribute:
        """An attribute that stays as it is until the contents are changed, or moved."""

    def changes_to(self, contents: CacheContents) -> list[Attribute]:
        """The changes that put `contents` in."""

    def check_room(self, tokens: int) -> None:
        """Raises CacheFullError where so many tokens more may not be cached."""

    def with_room(self, contents: CacheContents, tokens: int) -> CacheContents:
        """Its contents with slots for so many tokens more."""


class CacheOperations(ABC):
    """The operations that a layer's cache and a whole model's have in common.

    `truncate`, `select`, `compress`, `clear`, `detach`, `to` and `reserve` act on the cache itself and return it. An
    operation that raises has changed no layer.
    """

    @abstractmethod
    def parts(self) -> Sequence[Part]:
        """Its layers that have tokens or a source, or may get them."""

    # --- to be read -----------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """How many tokens the longest row has seen."""
        return max((max(part.figures.row_lengths) for part in self.parts()), default=0)

    @property
    def cached_length(self) -> int:
        """How many tokens of the longest row are in the cache, in the layer that has most."""
        return max((max(part.figures.row_cached_lengths) for part in self.parts()), default=0)

    @property
    def lengths(self) -> Tensor:
        """How many tokens each row has seen, int64 [B] on the host."""
        return self._per_row([part.figures.row_lengths for part in self.parts()])

    @property
    def cached_lengths(self) -> Tensor:
        """How many tokens of each row are in the cache, in the layer that has most; int64 [B] on the host."""
        return self._per_row([part.figures.row_cached_lengths for part in self.parts()])

    @property
    def held(self) -> int:
        """The same as `cached_length`."""
        return self.cached_length

    @property
    def helds(self) -> Tensor:
        """The same as `cached_lengths`."""
        return self.cached_lengths

    @property
    def batch(self) -> int | None:
        """Rows of the running batch; None before its first token."""
        return next((part.figures.batch for part in self.parts() if part.figures.batch is not None), None)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values; none while they are elsewhere (`offload`).

        Bytes that a fork shares are counted in each of the two.
        """
        return sum(part.figures.nbytes for part in self.parts())

    @property
    def nbytes_used(self) -> int:
        """Bytes of the keys and values of the cached tokens."""
        return sum(part.figures.nbytes_used for part in self.parts())

    # --- to be changed --------------------------------------------------------------------------------------------

    def truncate(self, length: int | Sequence[int]) -> Self:
        """Forgets the newest tokens, as after a rejected guess: rows keep their first `length`, shorter ones all.

        `length` is a number for all rows, or a list or tuple with one for each.
        After a call of `L <= W` tokens it reaches any length back to before that call, and every window is full again;
        tokens that calls in expanding mode had cached beyond a window, before it slid, stay evicted.
        The projected source of cross-attention is not touched. Raises ArgumentError unless `length` has whole
        numbers from 0 to the tokens seen, and CacheStateError, naming the oldest length possible, further back. After
        `compress` that is the length then; a cache that observes queries or weights for the policy of a `cache_budget`
        cannot be truncated: `fork()` it before a guess.
        """
        lengths, oldest = self._checked_lengths(length), EMPTY
        for part in self.parts():
            oldest = oldest.maximum(part.contents.oldest_lengths)
        if lengths.maximum(oldest) != lengths:
            least = oldest[0] if oldest.uniform else max(oldest) if lengths.uniform else list(oldest)
            if any(part.contents.is_observed for part in self.parts()):
                raise CacheStateError(
                    f"length: expected at least {least}, since the cache keeps queries or attention weights for its "
                    f"cache_budget, which cannot be taken back, got {length}; fork() the cache before a guess"
                )
            raise CacheStateError(
                f"length: expected at least {least}, since tokens that a window evicted before, or compress dropped, "
                f"are not stored any more, got {length}; clear() the cache to begin anew"
            )
        return self._changed(lambda contents: contents.truncated(lengths))

    def select(self, rows: Sequence[int] | Tensor) -> Self:
        """Keeps these rows, in this order: beams (reorder, repeat), finished requests (leave out), several samples.

        Rows that are repeated share their tokens: these are kept once and read once, and each row has slots for its own
        after them. Rows share where calls expand, without ALiBi, T5's bias, windows or gradients, and where that saves
        4 MiB in a layer (`kernels/tuning.py: min_shared_bytes`); else they are copied.

        Acts in place, as the operations beside it: rows that are left out are gone, `fork()` first to keep them.
        `rows` are indices, or a bool tensor [B] that is true for rows to keep. Raises ArgumentError for none at all, or
        an index outside the batch.
        """
        chosen = chosen_rows(rows, self.batch)
        return self if self.batch is None else self._changed(lambda contents: contents.selected(chosen))

    def compress(self, keep: int, by: AnyPolicy) -> Self:
        """Keeps, of each row and key/value head, the `keep` tokens that a policy scores highest, in order of position.

        `length` and all positions stay what they are; `cached_length` is then `keep`. Rows of `keep` tokens or fewer
        stay whole. Sinks (`num_sinks`) stay, and count among the `keep`. Of equal scores the newest are kept. Later
        `truncate` reaches back to the length that the cache has now. A source of cross-attention is not touched.

        Windows see the tokens that are kept where they were: one whose position is in the window of the query. While
        they slide, they evict the tokens that were kept as if those were the newest ones that had been read.

        Args:
            keep: the most tokens of a row, above `num_sinks` and what the policy always keeps.
            by: a policy of `transformer.cache.policies`, or any function `by(keys, values, *, positions)` that gives
                scores [B, G, S] of floats, of keys and values [B, G, S, D] at positions int64 [B, G, S].

        Raises ArgumentError for another `keep` or `by`; ConfigurationError for a policy whose needs are no numbers;
        ShapeError, DtypeError, DeviceError or ArgumentError for scores that do not fit; CacheStateError for a policy
        that needs queries or weights which the cache has not kept, since it was read without such a `cache_budget`.
        What the policy raises passes.
        """
        sinks = max((part.spec.num_sinks for part in self.parts()), default=0)
        if type(keep) is not int or keep <= sinks:
            raise ArgumentError(
                f"keep: expected a whole number of at least {sinks + 1} (sinks stay), got {shown(keep)}"
            )
        if not is_policy(by):
            raise ArgumentError(f"by: expected a policy of transformer.cache.policies or a function, got {shown(by)}")
        check_policy("keep", keep, by, sinks, ArgumentError)
        return self._changed_by_part(lambda part, contents: contents.compressed(keep, by, part.spec))

    def clear(self) -> Self:
        """Forgets everything, the fixed window too: equal to a new cache."""
        if logger.isEnabledFor(logging.DEBUG):
            # Read only then: lengths of a frozen layout are on the device.
            logger.debug("cleared: %d tokens seen, %d cached, %d bytes", self.length, self.cached_length, self.nbytes)
        # Contents that are elsewhere stay there, and need not be readable.
        parts, nothing = self.parts(), CacheContents()
        exchange([part.as_found() for part in parts], [change for part in parts for change in part.changes_to(nothing)])
        return self

    def detach(self) -> Self:
        """Cuts the graph: gradients of later calls end here."""
        return self.apply(Tensor.detach)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves all tensors to a device, a float dtype, or both."""
        return self.apply(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def apply(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Replaces every tensor by what `change` makes of it; the tokens stay the same."""
        return self._changed(lambda contents: contents.mapped(change))

    def reserve(self, tokens: int) -> Self:
        """Makes room for so many tokens more, at once or, in an empty cache, with the first ones that come.

        A cache that carries a graph keeps it, and makes the room at its next call without gradients. Raises
        ArgumentError for anything but a whole number from 0 to 2,147,483,647, and CacheFullError past a maximum length.
        """
        if type(tokens) is not int or not 0 <= tokens <= LARGEST_OPTION:
            raise ArgumentError(f"tokens: expected a whole number from 0 to {LARGEST_OPTION:,}, got {shown(tokens)}")
        for part in self.parts():
            part.check_room(tokens)
        return self._changed_by_part(lambda part, contents: part.with_room(contents, tokens))

    def _checked_lengths(self, length: object) -> Lengths:
        """The lengths that rows are truncated to: a single one for all, or one for each."""
        rows = length if isinstance(length, list | tuple) else (length,)
        if not all(type(each) is int and 0 <= each <= self.length for each in rows):
            raise ArgumentError(f"length: expected a whole number from 0 to {self.length}, got {shown(length)}")
        if rows is length and len(rows) != (self.batch or 0):
            raise ArgumentError(f"length: expected one number, or one for each of {self.batch or 0} rows, got {length}")
        return Lengths.of(rows)

    def _changed(self, change: Callable[[CacheContents], CacheContents]) -> Self:
        return self._changed_by_part(lambda _, contents: change(contents))

    def _changed_by_part(self, change: Callable[[Part, CacheContents], CacheContents]) -> Self:
        # All layers at once: a signal handler finds them all as they were, or all as they will be.
        expected, changes = [], []
        for part in self.parts():
            contents = part.contents
            expected.append((part, "contents", contents))
            changes += part.changes_to(change(part, contents))
        exchange(expected, changes)
        return self

    def _per_row(self, numbers: list[Lengths]) -> Tensor:
        most = EMPTY
        for number in numbers:
            most = most.maximum(number)
        return torch.tensor(most.expand(self.batch or 0), dtype=torch.int64, device="cpu")
