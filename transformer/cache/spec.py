"""Specification of one layer's cache: its shape, how many slots its buffers get, and how many bytes they take."""

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import torch

from ..codecs import CODECS, CodecNames, Coding
from ..errors import ArgumentError

SLACK = 64
"""Slots beyond the need at the first allocation, and beyond twice a window."""

LARGEST_OPTION = (1 << 31) - 1
"""Of heads, widths, windows and buffers, as PyTorch's kernels count them."""

OPTIONAL = "cache_dtype", "share"
"""Fields that a file has only where they are not None."""

Spec = TypeVar("Spec", bound="CacheSpec")


@dataclass(frozen=True)
class CacheSpec:
    """Shape of a layer's cache, fixed when it is made. Two caches of equal specification can continue each other.

    Args:
        num_kv_heads, head_dim: `G` and `D`.
        num_sinks, window_size: as in the module.
        max_length: the most tokens that may be cached; the buffers are then allocated once.
        position: how the module's position scheme describes itself; None where it is not known.
        cache_dtype: names of the codecs of keys and of values (`transformer.codecs`); None: numbers as they come.
        share: `(rank, ranks)` where ranks share the heads of a model: whose heads these are; None: all heads.
    """

    num_kv_heads: int
    head_dim: int
    num_sinks: int = field(default=0, kw_only=True)
    window_size: int | None = field(default=None, kw_only=True)
    max_length: int | None = field(default=None, kw_only=True)
    position: str | None = field(default=None, kw_only=True)
    cache_dtype: CodecNames | None = field(default=None, kw_only=True)
    share: tuple[int, int] | None = field(default=None, kw_only=True)

    # --- what it is compared and written by -------------------------------------------------------------------------

    def fields(self) -> dict[str, Any]:
        """The fields by name, fit for JSON and for the constructor; the last two only where they say something."""
        values = asdict(self)
        for name in OPTIONAL:
            if values[name] is None:
                del values[name]
        return values

    def differences(self, expected: "CacheSpec") -> dict[str, tuple[Any, Any]]:
        """The fields in which a cache does not fit a module that expects another: here and there, by name.

        The maximum length and the codecs do not count: a cache of another size can be continued, and tokens are
        stored as those before.
        """
        free = "max_length", "cache_dtype"
        return {name: pair for name, pair in self.unequal_fields(expected).items() if name not in free}

    def unequal_fields(self, other: "CacheSpec") -> dict[str, tuple[Any, Any]]:
        """The fields that differ: here and there, by name."""
        pairs = {each.name: (getattr(self, each.name), getattr(other, each.name)) for each in fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    @classmethod
    def from_fields(cls: type[Spec], described: Mapping[str, Any]) -> Spec:
        """The specification that a file describes. Raises ValueError where there can be none of these fields."""
        if {*described, *OPTIONAL} != _FITS.keys():
            raise ValueError(f"expected {sorted(_FITS)}, got {reprlib.repr(described)}")
        for name, value in described.items():
            if not _FITS[name](value):
                raise ValueError(f"expected another {name} than {reprlib.repr(value)}")
        pairs = {name: tuple(described[name]) for name in OPTIONAL if described.get(name) is not None}
        spec = cls(**{**described, **pairs})
        sinks, window, most = spec.num_sinks, spec.window_size, spec.max_length
        if sinks and window is None:
            raise ValueError(f"expected no num_sinks without a window_size, got {sinks}")
        if most is not None and window is not None and most < window + sinks:
            raise ValueError(f"expected a max_length of at least {window + sinks}, got {most}")
        return spec

    # --- capacity: slots of each row, those of the sinks aside ------------------------------------------------------

    def room(self, needed: int, capacity: int, window: int | None, reserved: int = 0) -> int:
        """Slots to allocate for `needed` tokens after a buffer of `capacity`, in a call with this `window`.

        Doubling, for a full window its limit; with a maximum length always the same.
        """
        if self.max_length is not None:
            return max(needed, self._fixed_room(self.max_length))
        grown = capacity if needed <= capacity else max(2 * capacity, needed + SLACK)
        if window is not None:
            limit = window_limit(window)
            grown = max(needed, limit if needed >= window else min(grown, limit))
        return max(grown, reserved)

    def most_room(self, length: int) -> int:
        """The most slots that `room` ever gives on the way to `length` tokens, however they are cut into calls.

        Raises ArgumentError where the cache cannot hold so many.
        """
        window = self.window_size
        if self.max_length is not None:
            if window is None and length > self.max_length:
                raise ArgumentError(
                    f"length: expected at most {self.max_length}, which is a layer's max_cache_length, got {length}"
                )
            return self._fixed_room(self.max_length)
        if window is not None and length >= window:
            return window_limit(window)
        # Before a window is full, a buffer of `length - 1` slots may just have to double, or the first call needs all.
        return max(length + SLACK, 2 * (length - 1))

    def compressed_bytes(self, batch: int, tokens: int, dtype: torch.dtype) -> int:
        """The most bytes after a compression to so many tokens, sinks among them, with their positions."""
        slots = self.room(tokens, 0, self.window_size) + self.num_sinks
        positions = batch * self.num_kv_heads * (tokens - self.num_sinks) * torch.int64.itemsize
        return self.nbytes(batch, slots, dtype) + positions

    def most_bytes(self, batch: int, length: int, dtype: torch.dtype) -> int:
        """The most bytes of keys and values, sinks included, once `batch` rows have seen `length` tokens."""
        return self.nbytes(batch, self.most_room(length) + self.num_sinks, dtype) if length else 0

    def nbytes(self, batch: int, slots: int, dtype: torch.dtype) -> int:
        """Bytes of keys and values of so many slots of each row."""
        names = (None, None) if self.cache_dtype is None else self.cache_dtype
        plain = self.head_dim * dtype.itemsize
        vector = sum(plain if name is None else CODECS[name].record_bytes(self.head_dim) for name in names)
        return batch * self.num_kv_heads * slots * vector

    def coding(self, dtype: torch.dtype) -> Coding | None:
        """How keys and values of this dtype are stored; None: as they come."""
        return None if self.cache_dtype is None else Coding.of(self.cache_dtype, self.head_dim, dtype)

    def _fixed_room(self, max_length: int) -> int:
        """Slots of a buffer that is allocated once."""
        return max_length if self.window_size is None else max(max_length, window_limit(self.window_size))


def window_limit(window: int) -> int:
    """Slots that a window ever needs: a full one, a chunk as long, and slack between two moves to the front."""
    return 2 * window + SLACK


def is_count(value: object) -> bool:
    """True for a number of heads, tokens or slots that a file may give."""
    return type(value) is int and 1 <= value <= LARGEST_OPTION


def is_count_or_none(value: object) -> bool:
    """True for such a number, and for None."""
    return value is None or is_count(value)


def is_pair_of_codecs(value: object) -> bool:
    """True for the names of two codecs, or of one and None."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return any(value) and all(name is None or (isinstance(name, str) and name in CODECS) for name in value)


def is_share(value: object) -> bool:
    """True for a rank and how many there are."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    rank, ranks = value
    return is_count(ranks) and type(rank) is int and 0 <= rank < ranks


_FITS: Mapping[str, Callable[[Any], bool]] = {
    "num_kv_heads": is_count,
    "head_dim": is_count,
    "num_sinks": lambda value: is_count(value) or (type(value) is int and value == 0),
    "window_size": is_count_or_none,
    "max_length": is_count_or_none,
    "position": lambda value: value is None or isinstance(value, str),
    "cache_dtype": is_pair_of_codecs,
    "share": is_share,
}
"""Check of each field that a file gives."""
