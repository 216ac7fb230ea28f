"""The cache of one attention layer: its own tokens, and the projected source of cross-attention."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError, CacheFullError, CacheStateError
from . import rows
from .append import appended, moved
from .context import Context
from .rows import Rows
from .source import Source, Weights
from .state import State, check_batch, check_continues, check_room
from .step import Step
from .storage import Storage, joined, room, taken, window_limit

EMPTY: Rows = (0,)


class Pending(NamedTuple):
    """What an append will make of the cache, once the call that it belongs to has come through."""

    context: Context
    state: State
    before: State | None
    """The state that it follows."""


class LayerCache(Mapping[str, Tensor]):
    """Keys and values that one attention module has seen and still holds; `module.kv_cache` is one of these.

    A mapping with exactly `'key'` and `'value'`, each [B, G, held, D] in order of position, to be read: views where
    rows are alike and nothing was let go before the sinks. Rows of different lengths are left-aligned and zero-filled.
    For a module that has only done cross-attention they are the projected source.

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
    ) -> None:
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.num_sinks = num_sinks
        self.window_size = window_size
        self.max_length = max_length
        self._state: State | None = None
        self._source: Source | None = None
        self._reserved = 0

    # --- to be read -----------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        if name not in ("key", "value"):
            raise KeyError(name)
        state = self._state
        if state is None:
            if self._source is None:
                return torch.empty(0, self.num_kv_heads, 0, self.head_dim)
            return self._source.key if name == "key" else self._source.value
        storage = state.storage
        tensor, sinks = storage.key, storage.sink_key
        if name == "value":
            tensor, sinks = storage.value, storage.sink_value
        count = rows.minus(state.length, state.start)
        main = taken(tensor, rows.minus(state.start, state.offset), count, max(count))
        let_go = state.sinks_let_go()
        if sinks is None or max(let_go) == 0:
            return main
        return joined(sinks[:, :, : max(let_go)], let_go, main, count, self.held)

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
    def length(self) -> int:
        """How many tokens the longest row has seen."""
        return max(self.row_lengths)

    @property
    def held(self) -> int:
        """How many tokens the longest row holds."""
        return max(self.row_helds)

    @property
    def lengths(self) -> Tensor:
        """How many tokens each row has seen, int64 [B] on the host."""
        return self._per_row(self.row_lengths)

    @property
    def helds(self) -> Tensor:
        """How many tokens each row holds, int64 [B] on the host."""
        return self._per_row(self.row_helds)

    @property
    def row_lengths(self) -> Rows:
        """How many tokens each row has seen: one entry where all rows are alike."""
        return EMPTY if self._state is None else self._state.length

    @property
    def row_helds(self) -> Rows:
        """How many tokens each row holds: one entry where all rows are alike."""
        return EMPTY if self._state is None else self._state.held()

    @property
    def batch(self) -> int | None:
        """Rows of the running batch; None before its first token."""
        return None if self._state is None else self._state.storage.key.shape[0]

    @property
    def window(self) -> int | None:
        """The window that the first sliding call fixed; None before it."""
        return None if self._state is None else self._state.window

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        own = 0 if self._state is None else self._state.storage.nbytes
        return own + (0 if self._source is None else self._source.nbytes)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the keys and values that are held."""
        per_token = 0
        if self._state is not None:
            key = self._state.storage.key
            per_token = 2 * self.num_kv_heads * self.head_dim * key.element_size()
        own = int(self.helds.sum()) * per_token
        return own + (0 if self._source is None else self._source.nbytes)

    @property
    def contents(self) -> tuple[State | None, Source | None]:
        """All that it holds, as one value: to be put back where a step of a whole model fails."""
        return self._state, self._source

    @contents.setter
    def contents(self, contents: tuple[State | None, Source | None]) -> None:
        self._state, self._source = contents

    # --- to be changed by its owner -------------------------------------------------------------------------------

    def clear(self) -> "LayerCache":
        """Forgets everything, the fixed window too: equal to a new cache."""
        self._state = None
        self._source = None
        self._reserved = 0
        return self

    def detach(self) -> "LayerCache":
        """Cuts the graph: gradients of later calls end here."""
        return self.apply(Tensor.detach)

    def reserve(self, tokens: int) -> "LayerCache":
        """Makes room for so many tokens more, at once or, in an empty cache, with the first ones that come.

        A cache that carries a graph keeps it, and makes the room at its next call without gradients. Raises
        ArgumentError for anything but a whole number from 0 on, and CacheFullError past `max_length`.
        """
        if type(tokens) is not int or tokens < 0:
            raise ArgumentError(f"tokens: expected a whole number of at least 0, got {tokens!r}")
        if self.max_length is not None and self.held + tokens > self.max_length:
            raise CacheFullError(
                f"tokens: the cache holds {self.held} of max_cache_length={self.max_length}, got {tokens} to reserve"
            )
        state = self._state
        self._reserved = tokens + (0 if state is None else max(rows.minus(state.length, state.start)))
        if state is None or state.storage.key.requires_grad:
            return self
        if state.storage.capacity < self._reserved:
            self._state = state = moved(state, self._reserved)
            state.storage.tip = state.ticket
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "LayerCache":
        """Moves what is held to a device, a float dtype, or both."""
        return self.apply(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def apply(self, change: Callable[[Tensor], Tensor]) -> "LayerCache":
        """Replaces every tensor by what `change` makes of it; the tokens stay the same."""
        state = None if self._state is None else self._state._replace(storage=self._state.storage.mapped(change))
        source = None if self._source is None else self._source.mapped(change)
        self._state, self._source = state, source
        return self

    # --- for the attention module ---------------------------------------------------------------------------------

    def append(self, key: Tensor, value: Tensor, step: Step) -> Pending:
        """Works out the cache after `step`'s new keys and values [B, G, width, D]; `commit` makes it so.

        Raises CacheFullError past `max_length`; DtypeError, DeviceError or CacheStateError where the tokens or the
        step do not continue what is held.
        """
        state = self._state
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

    def keep_source(self, source: Source) -> None:
        """Replaces the projected source of cross-attention."""
        self._source = source

    def forget_source(self) -> None:
        """Forgets the projected source: the next one is projected anew."""
        self._source = None

    def check_batch(self, batch: int) -> None:
        """Raises ShapeError where `batch` rows cannot continue what is held."""
        if self._state is not None:
            check_batch(self._state, batch)

    def _capacity(self, needed: int, capacity: int, window: int | None) -> int:
        if self.max_length is None:
            return max(room(needed, capacity, window), self._reserved)
        slots = 0 if self.window_size is None else window_limit(self.window_size)
        return max(needed, slots, self.max_length)

    def _per_row(self, numbers: Rows) -> Tensor:
        return torch.tensor(rows.spread(numbers, self.batch or 0) if len(numbers) == 1 else numbers, dtype=torch.int64)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerCache":
        copy = LayerCache(**self._options())
        memo[id(self)] = copy
        copy._restore(self._kept())
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self._options(), "kept": self._kept()}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        LayerCache.__init__(self, **saved["options"])
        self._restore(saved["kept"])

    def _options(self) -> dict[str, Any]:
        return {
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_sinks": self.num_sinks,
            "window_size": self.window_size,
            "max_length": self.max_length,
        }

    def _kept(self) -> dict[str, Any]:
        """Detached copies of what is held, without unused slots."""
        kept: dict[str, Any] = {"source": None if self._source is None else self._source.copied()}
        if self._state is not None:
            state = moved(self._state, max(rows.minus(self._state.length, self._state.start)))
            kept["state"] = state._replace(storage=Storage(*state.storage.tensors))
        return kept

    def _restore(self, kept: dict[str, Any]) -> None:
        self._state = kept.get("state")
        self._source = kept["source"]
