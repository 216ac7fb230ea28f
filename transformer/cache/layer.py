"""The cache of one attention layer: its own tokens, and the projected source of cross-attention."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, CacheFullError
from ..tracing import is_compiling
from . import files
from .append import appended, moved
from .contents import CacheContents
from .cross_kv import CrossKV
from .exchange import Attribute, exchange
from .key_value_view import KeyValueView
from .lengths import Lengths
from .operations import CacheOperations
from .plan import frozen
from .snapshot import Snapshot, from_snapshot, snapshot_of
from .state import SelfAttentionState, check_continues, check_room
from .static_layout import StaticLayout, mark_static_address
from .step import Step
from .storage import fixed_room, room, window_limit

logger = logging.getLogger(__name__)


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

    All that it holds is one immutable value, `contents`, rebound last: a call that raises leaves the cache as it was.
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
        self.contents = CacheContents()
        self._static_source: CrossKV | None = None

    # --- to be read -----------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        if name not in ("key", "value"):
            raise KeyError(name)
        shown = self.contents.in_order(values=name == "value")
        if shown is not None:
            return shown
        return torch.empty(0, self.num_kv_heads, 0, self.head_dim, dtype=torch.float32, device="cpu")

    def __iter__(self) -> Iterator[str]:
        return iter(("key", "value"))

    def __len__(self) -> int:
        return 2

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return (
            f"LayerCache(length={self.length}, held={self.cached_length}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, nbytes={self.nbytes})"
        )

    @property
    def static(self) -> StaticLayout | None:
        """The tokens as a step reads and writes them that is being compiled now; None in any other."""
        return frozen(self.contents)

    @property
    def static_source(self) -> CrossKV | None:
        """The source that was there when the layout was frozen, while a step is compiled; None at any other time."""
        kept = self.contents.source
        return kept if kept is self._static_source and is_compiling() else None

    @property
    def row_lengths(self) -> Lengths:
        """How many tokens each row has seen: one entry where all rows are alike."""
        return self.contents.row_lengths

    @property
    def row_cached_lengths(self) -> Lengths:
        """How many tokens each row holds: one entry where all rows are alike."""
        return self.contents.row_cached_lengths

    @property
    def window(self) -> int | None:
        """The window that the first sliding call fixed; None before it."""
        return None if self.contents.state is None else self.contents.state.window

    @property
    def source(self) -> CrossKV | None:
        """The projected source of cross-attention, where there is one."""
        return self.contents.source

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
            if cache.contents.kinds != caches[0].contents.kinds:
                raise ArgumentError("caches: expected all to have seen tokens, or all a source, got one that has not")
        joint = cls(**options)
        joint.put(CacheContents.side_by_side([cache.contents for cache in caches], joint._capacity))
        return joint

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the conversation into one safetensors file, whole or not at all; see `KVCache.save`."""
        files.write(path, files.SavedCache({"": (self.options, snapshot_of(self.contents))}))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "LayerCache":
        """The conversation in a file that `save` of one layer wrote; raises as `KVCache.load`."""
        return cls.from_record(*files.read_one(path))

    @classmethod
    def from_record(cls, options: dict[str, Any], record: Snapshot) -> "LayerCache":
        """A cache of these options that holds what a record tells; the record's tensors are its own from now on."""
        cache = cls(**options)
        cache.contents = from_snapshot(record)
        return cache

    def holding(self, contents: CacheContents) -> "LayerCache":
        """A cache of the same options that holds something else."""
        cache = LayerCache(**self.options)
        cache.contents = contents
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

    def put(self, contents: CacheContents) -> None:
        """Replaces all that it holds."""
        exchange((), self.replacing(contents))

    def replacing(self, contents: CacheContents) -> list[Attribute]:
        """What has to be set so that it holds `contents`, which an operation has made of what it holds now."""
        before, state = self.contents.state, contents.state
        changes: list[Attribute] = [(self, "contents", contents)]
        if (
            isinstance(before, SelfAttentionState)
            and isinstance(state, SelfAttentionState)
            and state.storage is before.storage
        ):
            # Truncated: it may go on in place where what it then rewrites can be read by nobody else.
            storage = state.storage
            if storage.leased(before.ticket) and min(state.slot(state.length)) >= storage.readable:
                changes += [(storage, "lease", [state.ticket]), (storage, "clean", False)]
        return changes

    def appending(self, contents: CacheContents) -> list[Attribute]:
        """What has to be set so that it holds `contents`, which a call has made by appending, or by a source."""
        state, source = contents.state, contents.source
        if source is not None and source is not self.contents.source:
            logger.debug("source kept: %d tokens, %d bytes", source.key.shape[2], source.nbytes)
        changes: list[Attribute] = [(self, "contents", contents)]
        if isinstance(state, SelfAttentionState) and state is not self.contents.state and state.storage.owned:
            changes.append((state.storage, "lease", [state.ticket]))
        return changes

    def check_room(self, tokens: int) -> None:
        """Raises CacheFullError where so many tokens more may not be held."""
        if self.max_length is not None and self.cached_length + tokens > self.max_length:
            raise CacheFullError(
                f"tokens: the cache holds {self.cached_length} of max_cache_length={self.max_length}, "
                f"got {tokens} to reserve"
            )

    def make_room(self, tokens: int) -> None:
        """Reserves slots for so many tokens more."""
        state = self.contents.settled
        # With what `truncate` may need again.
        reserved = tokens + (0 if state is None else max(state.length - state.stored))
        contents = self.contents._replace(reserved=reserved)
        if state is None or state.storage.key.requires_grad or state.storage.capacity >= reserved:
            self.put(contents)
            return
        fresh = moved(state, reserved, state.stored)
        slots, before = fresh.storage.capacity, state.storage.capacity
        logger.debug("reserved: %d slots a row (before: %d), %d bytes", slots, before, fresh.storage.nbytes)
        self.put(contents._replace(state=fresh))

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
        state, source = self.contents.settled, self.contents.source
        static: SelfAttentionState | StaticLayout | None = state
        if source is not None:
            # A copy: compiled steps compare by content, and the caller may change what is kept in place.
            source = self._static_source = source.mapped(lambda t: mark_static_address(t.clone()))
        if state is not None:
            # A window that a call has fixed needs slots for what `truncate` may need again, as one that was given does.
            slots = 0 if state.window is None else window_limit(state.window)
            static = StaticLayout.of(state, max(self._capacity(max(state.cached_lengths()), 0, None), slots))
        self.contents = self.contents._replace(state=static, source=source)
        return self

    def allocate(self, batch: int, tokens: int, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        """Begins anew, with buffers for so many tokens of each row at once rather than with the first ones that come.

        From then on other rows, dtypes and devices are refused.
        """
        like = torch.empty(batch, self.num_kv_heads, 0, self.head_dim, dtype=dtype, device=device)
        self.put(CacheContents(SelfAttentionState.empty(like, self.num_sinks)))
        self.reserve(tokens)

    # --- for the attention module ---------------------------------------------------------------------------------

    def append(
        self, contents: CacheContents, key: Tensor, value: Tensor, step: Step
    ) -> tuple[KeyValueView, CacheContents]:
        """What the queries of `step` may look at, and `contents` after its new keys and values [B, G, width, D].

        Raises CacheFullError past `max_length`; DtypeError, DeviceError or CacheStateError where the tokens or the
        step do not continue what is held.
        """
        state = contents.settled
        if state is None:
            state = SelfAttentionState.empty(key, self.num_sinks)
        check_continues(state, key, step)
        if self.max_length is not None:
            check_room(state, step, self.max_length)
        view, state = appended(state, key, value, step, partial(self._capacity, reserved=contents.reserved))
        return view, contents._replace(state=state)

    def _capacity(self, needed: int, capacity: int, window: int | None, reserved: int = 0) -> int:
        if self.max_length is None:
            return max(room(needed, capacity, window), reserved)
        return max(needed, fixed_room(self.max_length, self.window_size))

    # --- copies ---------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerCache":
        copy = memo[id(self)] = LayerCache.from_record(self.options, snapshot_of(self.contents))
        return copy

    def __getstate__(self) -> tuple[dict[str, Any], Snapshot]:
        return self.options, snapshot_of(self.contents)

    def __setstate__(self, saved: tuple[dict[str, Any], Snapshot]) -> None:
        LayerCache.__init__(self, **saved[0])
        self.contents = from_snapshot(saved[1])
