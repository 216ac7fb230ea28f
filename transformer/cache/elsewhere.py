"""Contents of a layer's cache that are elsewhere: their figures, and their return at the first use."""

from abc import ABC, abstractmethod
from typing import Any, Protocol

from ..errors import ConcurrentUseError
from .contents import CacheContents
from .cross_kv import CrossKV
from .lease import Attribute, exchange
from .lengths import Lengths


class Figures(Protocol):
    """Numbers of some contents, which need none of their tensors."""

    @property
    def row_lengths(self) -> Lengths:
        """How many tokens each row has seen: one entry where all rows are equal."""

    @property
    def row_cached_lengths(self) -> Lengths:
        """How many tokens of each row are cached: one entry where all rows are equal."""

    @property
    def batch(self) -> int | None:
        """How many rows there are; None where there is nothing yet."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""

    @property
    def nbytes_used(self) -> int:
        """Bytes of the keys and values of the cached tokens."""


class Elsewhere(ABC):
    """The figures of contents that were moved elsewhere, and the way back. No bytes are allocated for them here."""

    nbytes = 0
    nbytes_used = 0

    def __init__(self, contents: CacheContents) -> None:
        self.row_lengths = contents.row_lengths
        self.row_cached_lengths = contents.row_cached_lengths
        self.batch = contents.batch

    @abstractmethod
    def contents(self) -> CacheContents:
        """New contents, equal to those that were moved. Raises where they cannot be read, and may be asked again."""


class _Return:
    """Attribute `contents` of a cache whose contents are elsewhere: they come back.

    Python runs it only where the instance has no such attribute: contents in memory are read at the speed of any
    attribute, and `exchange` reads and sets them without running Python.
    """

    def __get__(self, cache: "HasContents | None", owner: type | None = None) -> Any:
        if cache is None:
            return self
        while True:
            # One look: each dict that a cache ever has contains one of the two.
            attributes = vars(cache)
            if "contents" in attributes:
                return attributes["contents"]
            elsewhere = attributes.get("_elsewhere")
            if elsewhere is None:
                raise AttributeError("contents")
            contents = elsewhere.contents()
            try:
                exchange([(cache, "_elsewhere", elsewhere)], [cache.moved_here(contents)])
            except ConcurrentUseError:
                continue  # Another thread was faster; its contents may have changed since.
            return contents


class HasContents:
    """A cache with contents, in memory or elsewhere.

    Both moves replace the instance's dict, in one exchange: a cache never has both, or neither, and what another thread
    or a signal handler has put there in between is noticed.
    """

    contents: CacheContents = _Return()  # type: ignore[assignment]
    _elsewhere: Elsewhere | None = None
    _static_source: CrossKV | None = None
    """The source that was there when the layout was frozen."""

    @property
    def figures(self) -> Figures:
        """Lengths, rows and bytes of the contents, which stay where they are."""
        attributes = vars(self)
        figures: Figures = attributes["contents"] if "contents" in attributes else attributes["_elsewhere"]
        return figures

    def as_found(self) -> Attribute:
        """An attribute that stays as it is until the contents are changed, or moved."""
        elsewhere = self._elsewhere
        return (self, "contents", self.contents) if elsewhere is None else (self, "_elsewhere", elsewhere)

    def moved_here(self, contents: CacheContents) -> Attribute:
        """The change that puts contents into memory, and forgets what is elsewhere."""
        return self, "__dict__", {**self._others(), "contents": contents}

    def moved_away(self, elsewhere: Elsewhere) -> Attribute:
        """The change that frees the contents, which are elsewhere."""
        return self, "__dict__", {**self._others(), "_static_source": None, "_elsewhere": elsewhere}

    def _others(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("contents", "_elsewhere")}
