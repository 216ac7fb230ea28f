"""KV cache of one attention layer: its own tokens, and the projected source of cross-attention."""

import logging
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from typing_extensions import Self

from ..codecs import CodecNames
from ..errors import ArgumentError, CacheFullError, CacheStateError
from . import files
from .append import moved, window_moved
from .contents import CacheContents
from .key_value_mapping import KeyValueMapping
from .lease import Attribute, exchange
from .offload import offload
from .operations import CacheOperations
from .rearrange import lease_of_truncated
from .snapshot import Snapshot, from_snapshot, snapshot_of
from .spec import CacheSpec
from .state import SelfAttentionState, check_whole
from .static_layout import StaticLayout, mark_static_address

logger = logging.getLogger(__name__)


class LayerCache(CacheOperations, KeyValueMapping):
    """Keys and values that one attention module has cached; `module.kv_cache` is one of these.

    A mapping with exactly `'key'` and `'value'`, each [B, G, cached_length, D] in order of position, to be read: views
    where rows are equal, no sink is evicted and no prefix is shared. Rows of different lengths are left-aligned and
    zero-filled. For a module that has only done cross-attention they are the projected source.

    Args:
        num_kv_heads, head_dim, num_sinks, window_size, max_length, position, cache_dtype, share: see `CacheSpec`,
            which they make.

    Its whole state is one immutable value, `contents`, rebound last: a call that raises leaves the cache as it was.
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
        cache_dtype: CodecNames | None = None,
        share: tuple[int, int] | None = None,
    ) -> None:
        self.spec = CacheSpec(
            num_kv_heads,
            head_dim,
            num_sinks=num_sinks,
            window_size=window_size,
            max_length=max_length,
            position=position,
            cache_dtype=cache_dtype,
            share=share,
        )
        self.contents = CacheContents()
        self._static_source = None

    @classmethod
    def of(cls, spec: CacheSpec, contents: CacheContents | None = None) -> "LayerCache":
        """A cache of this specification; with contents that no other cache writes to, or empty."""
        cache = cls(**spec.fields())
        if contents is not None:
            cache.contents = contents
        return cache

    def holding(self, contents: CacheContents) -> "LayerCache":
        """A view of other contents by the same specification."""
        return LayerCache.of(self.spec, contents)

    def __repr__(self) -> str:
        stored = "" if self.cache_dtype is None else f"cache_dtype={self.cache_dtype}, "
        return (
            f"LayerCache(length={self.length}, cached_length={self.cached_length}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, {stored}nbytes={self.nbytes})"
        )

    # --- changes of this layer alone ----------------------------------------------------------------------------------

    def parts(self) -> "Sequence[LayerCache]":
        """Itself."""
        return (self,)

    def put(self, contents: CacheContents) -> None:
        """Replaces the contents."""
        exchange((), self.changes_to(contents))

    def changes_to(self, contents: CacheContents) -> list[Attribute]:
        """The changes that put `contents` in, which an operation has made of those that are there."""
        if self._elsewhere is not None:
            return [self.moved_here(contents)]
        before, state = self.contents.state, contents.state
        changes: list[Attribute] = [(self, "contents", contents)]
        if isinstance(before, SelfAttentionState) and isinstance(state, SelfAttentionState):
            changes += lease_of_truncated(before, state)
        return changes

    def check_room(self, tokens: int) -> None:
        """Raises CacheFullError where so many tokens more may not be cached."""
        most = self.spec.max_length
        if most is not None and self.cached_length + tokens > most:
            raise CacheFullError(
                f"tokens: expected at most {most} in the cache (max_cache_length), got {tokens} to reserve beside the "
                f"{self.cached_length} that it has"
            )

    def with_room(self, contents: CacheContents, tokens: int) -> CacheContents:
        """Its contents with slots for so many tokens more."""
        state = contents.ordered_state
        # With the evicted tokens that `truncate` may need again.
        reserved = tokens + (0 if state is None else max(state.length - state.stored))
        contents = contents._replace(reserved=reserved)
        if state is None or state.buffers.key.requires_grad or state.buffers.capacity >= reserved:
            return contents
        fresh = moved(state, reserved, state.stored)
        slots, before = fresh.buffers.capacity, state.buffers.capacity
        logger.debug("reserved: %d slots a row (before: %d), %d bytes", slots, before, fresh.buffers.nbytes)
        return contents._replace(state=fresh)

    def make_room(self, tokens: int) -> None:
        """Moves the tokens of a window to fresh buffers where a call of so many more would, but before that call.

        Old and fresh buffers of all layers live until a call ends; before it, those of one layer at a time.
        """
        state = self.contents.state
        if isinstance(state, SelfAttentionState) and (fresh := window_moved(state, tokens, self.spec)) is not state:
            self.put(self.contents._replace(state=fresh))

    def freeze_layout(self) -> Self:
        """Lays out the cache for compiled steps, which then are one graph at any length.

        They use the source that is kept now, and the weights that it was projected by. Any eager call, or operation,
        puts the tokens back in order. Raises ArgumentError for a cache without `max_length`, whose shapes
        cannot be fixed, and CacheStateError after `compress`, and where a `cache_budget` observes what compiled steps
        would not.
        """
        if self.spec.max_length is None:
            raise ArgumentError(
                "max_length: expected a number, so that shapes can be fixed, got None; "
                "build the module with max_cache_length"
            )
        self.check_can_freeze()
        contents = self.contents
        exchange([(self, "contents", contents)], self.frozen(contents))
        return self

    def frozen(self, contents: CacheContents) -> list[Attribute]:
        """The changes that lay out its contents for compiled steps."""
        state, source, changes = contents.whole_state, contents.source, list[Attribute]()
        if source is not None:
            # A copy: compiled steps compare by content, and the caller may change the kept tensor in place.
            source = source.mapped(lambda t: mark_static_address(t.clone()))
            changes.append((self, "_static_source", source))
        static = None if state is None else StaticLayout.of(state, self.spec)
        return [*changes, (self, "contents", contents._replace(state=static, source=source))]

    def check_can_freeze(self) -> None:
        """Raises CacheStateError where compiled steps cannot continue what is cached."""
        state = self.contents.state
        if isinstance(state, SelfAttentionState):
            check_whole(state, "freeze_layout")
        if isinstance(state, SelfAttentionState) and (state.kept is not None or state.observed is not None):
            raise CacheStateError(
                "freeze_layout: expected a cache whose tokens count at their own positions, and that observes nothing "
                "for a policy, got one after compress() or with a cache_budget; call its module as it is"
            )

    def allocate(self, batch: int, tokens: int, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        """Begins anew, with buffers for so many tokens of each row at once rather than with the first ones that come.

        From then on other rows, dtypes and devices are refused.
        """
        like = torch.empty(batch, self.num_kv_heads, 0, self.head_dim, dtype=dtype, device=device)
        empty = CacheContents(SelfAttentionState.empty(like, self.num_sinks, self.spec.coding(dtype)))
        self.put(self.holding(empty).reserve(tokens).contents)

    # --- conversations ----------------------------------------------------------------------------------------------

    def fork(self) -> "LayerCache":
        """A second conversation that begins with all that this one has seen. It costs nothing until one side writes."""
        return LayerCache.of(self.spec, self.contents.forked())

    @classmethod
    def join(cls, caches: "Sequence[LayerCache]") -> "LayerCache":
        """The rows of all caches in one running batch, each with its own length; they themselves stay as they are.

        One that has read nothing yet is one row of length 0. Raises ArgumentError, DtypeError or DeviceError where they
        cannot stand in one batch.
        """
        if not caches:
            raise ArgumentError("caches: expected at least one, got none")
        return cls.joined(caches, [cache.contents.batch or 1 for cache in caches])

    @classmethod
    def joined(cls, caches: "Sequence[LayerCache]", rows: Sequence[int]) -> "LayerCache":
        """The same as `join`, where caches that have read nothing are of so many `rows` each."""
        first = caches[0]
        for cache in caches:
            if cache.spec != first.spec:
                differing = cache.spec.unequal_fields(first.spec).items()
                raise ArgumentError(
                    "caches: expected all to be of one specification, got one that differs from the first in "
                    + ", ".join(f"{name} ({here!r}, there {there!r})" for name, (here, there) in differing)
                )
        return cls.of(first.spec, CacheContents.concatenated([cache.contents for cache in caches], rows, first.spec))

    def offload(self, path_or_device: str | PathLike[str] | torch.device) -> Self:
        """Moves the contents into a file or to another device, from where they come back by themselves.

        See `KVCache.offload`, which also refuses while a call is running; here it is that call which is refused, at its
        end.
        """
        offload({"": self}, path_or_device)
        return self

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the conversation into one safetensors file, whole or not at all; see `KVCache.save`."""
        files.write(path, files.SavedCache({"": (self.spec, snapshot_of(self.contents))}))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "LayerCache":
        """The conversation in a file that `save` of one layer wrote; raises as `KVCache.load`."""
        return cls.from_snapshot(*files.read_one(path))

    @classmethod
    def from_snapshot(cls, spec: CacheSpec, snapshot: Snapshot) -> "LayerCache":
        """A cache with the contents of a snapshot, whose tensors are its own from now on."""
        return cls.of(spec, from_snapshot(spec, snapshot))

    # --- copies -----------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerCache":
        copy = memo[id(self)] = LayerCache.from_snapshot(self.spec, snapshot_of(self.contents))
        return copy

    def __getstate__(self) -> tuple[dict[str, Any], Snapshot]:
        return self.spec.fields(), snapshot_of(self.contents)

    def __setstate__(self, saved: tuple[dict[str, Any], Snapshot]) -> None:
        LayerCache.__init__(self, **saved[0])
        self.contents = from_snapshot(self.spec, saved[1])
