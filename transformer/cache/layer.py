"""The cache of one attention layer: its own tokens, and the projected source of cross-attention."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError, CacheFullError, CacheStateError
from . import files, rows
from .append import appended, moved
from .contents import EMPTY, Contents
from .context import Context
from .operations import CacheOperations
from .record import Record, recorded, restored
from .rows import Rows
from .source import Source, Weights
from .state import State, check_batch, check_continues, check_room
from .static import Static, stays
from .step import Step
from .storage import fixed_room, room, window_limit

logger = logging.getLogger(__name__)


class Pending(NamedTuple):
    """What an append will make of the cache, once the call that it belongs to has come through."""

    context: Context
    state: State
    before: State | Static | None
    """The state that it follows."""


class LayerCache(CacheOperations, Mapping[str, Tensor]):
    """Keys and values that one attention module has seen and still holds; `module.kv_cache` is one of these.

    A mapping with exactly `'key'` and `'value'`, each [B, G, held, D] in order of position, to be read: views where
    rows are alike and nothing was let go before the sinks. Rows of different lengths are left-aligned and zero-filled.
    For a module that has only done cross-attention they are the projected source.

    Args:
        num_kv_heads, head_dim: `G` and `D`.
        num_sinks, window_size: as in the module.
        max_length: most tokens that may be held; the buffer is then allocated once.
        position: how the module's position scheme describes itself; None where nobody knows.

    The whole state is one immutable tuple, rebound last: a call that raises leaves the cache as it was.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_sinks: int = 0,
        window_size: int | None = None,
        max_length: int | None = None,
        position: str | None = None,
    ) -> None:
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.num_sinks = num_sinks
        self.window_size = window_size
        self.max_length = max_length
        self.position = position
        self._state: State | Static | None = None
        self._source: Source | None = None
        self._static_source: Source | None = None
        self._reserved = 0

    # --- to be read -----------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        if name not in ("key", "value"):
            raise KeyError(name)
        shown = self.contents.in_order(values=name == "value")
        return torch.empty(0, self.num_kv_heads, 0, self.head_dim) if shown is None else shown

    def __iter__(self) -> Iterator[str]:
        return iter(("key", "value"))

    def __len__(self) -> int:
        return 2

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return (
            f"LayerCache(length={self.length}, held={self.held}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, nbytes={self.nbytes})"
        )

    @property
    def static(self) -> Static | None:
        """The tokens as a step reads and writes them that is being compiled now; None in any other."""
        state = self._state
        return state if isinstance(state, Static) and torch.compiler.is_compiling() else None

    @property
    def static_source(self) -> Source | None:
        """The source that was there when the layout was frozen, while a step is compiled; None at any other time."""
        kept = self._source if self._source is self._static_source else None
        return kept if torch.compiler.is_compiling() else None

    @property
    def row_lengths(self) -> Rows:
        """How many tokens each row has seen: one entry where all rows are alike."""
        return EMPTY if self._state is None else self._state.length

    @property
    def row_helds(self) -> Rows:
        """How many tokens each row holds: one entry where all rows are alike."""
        return EMPTY if self._state is None else self._state.held()

    @property
    def window(self) -> int | None:
        """The window that the first sliding call fixed; None before it."""
        return None if self._state is None else self._state.window

    @property
    def source(self) -> Source | None:
        """The projected source of cross-attention, where there is one."""
        return self._source

    # --- conversations --------------------------------------------------------------------------------------------

    def fork(self) -> "LayerCache":
        """A second conversation that begins with all that this one has seen. It costs nothing until one side writes."""
        fork = LayerCache(**self.options)
        fork.put(self.contents.forked())
        return fork

    @classmethod
    def join(cls, caches: "Sequence[LayerCache]") -> "LayerCache":
        """The rows of all caches in one running batch, each with its own length; they themselves stay as they are.

        Raises ArgumentError, DtypeError or DeviceError where they cannot stand in one batch.
        """
        if not caches:
            raise ArgumentError("caches: expected at least one, got none")
        options = caches[0].options
        for cache in caches:
            if cache.options != options:
                raise ArgumentError(f"caches: expected all to be of {options}, as the first, got {cache.options}")
            if [part is None for part in cache.contents] != [part is None for part in caches[0].contents]:
                raise ArgumentError("caches: expected all to have seen tokens, or all a source, got one that has not")
        joint = cls(**options)
        joint.put(Contents.side_by_side([cache.contents for cache in caches], joint._capacity))
        return joint

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the conversation into one safetensors file, whole or not at all; see `KVCache.save`."""
        files.write(path, {"": (self.options, recorded(self.contents))})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "LayerCache":
        """The conversation in a file that `save` of one layer wrote; raises as `KVCache.load`."""
        return cls.from_record(*files.read_one(path))

    @classmethod
    def from_record(cls, options: dict[str, Any], record: Record) -> "LayerCache":
        """A cache of these options that holds what a record tells; the record's tensors are its own from now on."""
        cache = cls(**options)
        cache._state, cache._source = restored(record)
        return cache

    @property
    def options(self) -> dict[str, Any]:
        """What its constructor was given."""
        return {
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_sinks": self.num_sinks,
            "window_size": self.window_size,
            "max_length": self.max_length,
            "position": self.position,
        }

    # --- for operations -------------------------------------------------------------------------------------------

    def parts(self) -> "Sequence[LayerCache]":
        """Itself."""
        return (self,)

    @property
    def contents(self) -> Contents:
        """All that it holds, as one value."""
        return Contents(self._state, self._source)

    def put(self, contents: Contents) -> None:
        """Replaces all that it holds."""
        before, state = self._state, contents.state
        if state is None:
            self._reserved = 0
        elif isinstance(before, State) and isinstance(state, State) and state.storage is before.storage:
            # Truncated: it may go on in place where what it then rewrites can be read by nobody else.
            storage = state.storage
            if storage.tip is before.ticket and min(state.slot(state.length)) >= storage.readable:
                storage.tip, storage.clean = state.ticket, False
        self._state, self._source = contents

    def check_room(self, tokens: int) -> None:
        """Raises CacheFullError where so many tokens more may not be held."""
        if self.max_length is not None and self.held + tokens > self.max_length:
            raise CacheFullError(
                f"tokens: the cache holds {self.held} of max_cache_length={self.max_length}, got {tokens} to reserve"
            )

    def make_room(self, tokens: int) -> None:
        """Reserves slots for so many tokens more."""
        state = self.contents.settled
        # With what `truncate` may need again.
        self._reserved = tokens + (0 if state is None else max(rows.minus(state.length, state.stored)))
        if state is None or state.storage.key.requires_grad:
            return
        if state.storage.capacity < self._reserved:
            fresh = moved(state, self._reserved, state.stored)
            slots, before = fresh.storage.capacity, state.storage.capacity
            logger.debug("reserved: %d slots a row (before: %d), %d bytes", slots, before, fresh.storage.nbytes)
            self.put(Contents(fresh, self._source))

    def freeze_layout(self) -> "LayerCache":
        """Lays out what is held for compiled steps, which then are one graph at any length.

        They go on with the source that is kept now, and with the weights that it was projected by. Any eager call, or
        operation, puts the tokens back in order. Raises ArgumentError for a cache without `max_length`, whose shapes
        cannot be fixed.
        """
        if self.max_length is None:
            raise ArgumentError(
                "max_length: expected a number, so that shapes can be fixed, got None; "
                "build the module with max_cache_length"
            )
        state = self.contents.settled
        if self._source is not None:
            # A copy: compiled steps compare by content, and the caller may change what is kept in place.
            self._source = self._static_source = self._source.mapped(lambda t: stays(t.clone()))
        if state is not None:
            # A window that a call has fixed needs slots for what `truncate` may need again, as one that was given does.
            slots = 0 if state.window is None else window_limit(state.window)
            self._state = Static.of(state, max(self._capacity(max(state.held()), 0, None), slots))
        return self

    def allocate(self, batch: int, tokens: int, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        """Begins anew, with buffers for so many tokens of each row at once rather than with the first ones that come.

        From then on other rows, dtypes and devices are refused.
        """
        like = torch.empty(batch, self.num_kv_heads, 0, self.head_dim, dtype=dtype, device=device)
        self.put(Contents(State.empty(like, self.num_sinks)))
        self.reserve(tokens)

    # --- for the attention module ---------------------------------------------------------------------------------

    def append(self, key: Tensor, value: Tensor, step: Step) -> Pending:
        """Works out the cache after `step`'s new keys and values [B, G, width, D]; `commit` makes it so.

        Raises CacheFullError past `max_length`; DtypeError, DeviceError or CacheStateError where the tokens or the
        step do not continue what is held.
        """
        state = self.contents.settled
        if state is None:
            state = State.empty(key, self.num_sinks)
        check_continues(state, key, step)
        if self.max_length is not None:
            check_room(state, step, self.max_length)
        return Pending(*appended(state, key, value, step, self._capacity), self._state)

    def commit(self, pending: Pending) -> None:
        """Takes over what `append` worked out. Raises CacheStateError where another call has come in between."""
        if self._state is not pending.before:
            raise CacheStateError("kv_cache: changed by another module while this call was running; repeat it")
        storage = pending.state.storage
        storage.tip = pending.state.ticket if storage.owned else None
        self._state = pending.state

    def source_made_from(self, kv: Tensor, mask: Tensor | None, weights: Weights | None) -> Source | None:
        """The projected source, where it still is the one that these would give; None where they must be projected."""
        source = self._source
        if source is None or not source.made_from(kv, mask, weights):
            return None
        self._source = source.witnessed(kv)
        return self._source

    def keep_source(self, source: Source | None) -> None:
        """Replaces the projected source of cross-attention; None: forgets it, and the next one is projected anew."""
        if source is not None:
            logger.debug("source kept: %d tokens, %d bytes", source.key.shape[2], source.nbytes)
        self._source = source

    def check_batch(self, batch: int) -> None:
        """Raises ShapeError where `batch` rows cannot continue what is held."""
        if self._state is not None:
            check_batch(self._state.storage, batch)

    def _capacity(self, needed: int, capacity: int, window: int | None) -> int:
        if self.max_length is None:
            return max(room(needed, capacity, window), self._reserved)
        return max(needed, fixed_room(self.max_length, self.window_size))

    # --- copies ---------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerCache":
        copy = memo[id(self)] = LayerCache.from_record(self.options, recorded(self.contents))
        return copy

    def __getstate__(self) -> tuple[dict[str, Any], Record]:
        return self.options, recorded(self.contents)

    def __setstate__(self, saved: tuple[dict[str, Any], Record]) -> None:
        LayerCache.__init__(self, **saved[0])
        self._state, self._source = restored(saved[1])
