"""Operations of one layer's cache, alone or as one of the layers of a conversation."""

import logging
from collections.abc import Sequence

import torch
from typing_extensions import Self

from ..errors import ArgumentError, CacheFullError
from .append import moved
from .contents import CacheContents
from .key_value_mapping import KeyValueMapping
from .lease import Attribute, exchange
from .operations import CacheOperations
from .state import SelfAttentionState
from .static_layout import StaticLayout, mark_static_address

logger = logging.getLogger(__name__)


class LayerOperations(CacheOperations, KeyValueMapping):
    """The operations of a conversation on this only layer, and those that single layers have besides."""

    def __repr__(self) -> str:
        return (
            f"LayerCache(length={self.length}, held={self.cached_length}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, nbytes={self.nbytes})"
        )

    def parts(self) -> "Sequence[LayerOperations]":
        """Itself."""
        return (self,)

    def put(self, contents: CacheContents) -> None:
        """Replaces the contents."""
        exchange((), self.replacing(contents))

    def replacing(self, contents: CacheContents) -> list[Attribute]:
        """The changes that put `contents` in, which an operation has made of those that are there."""
        before, state = self.contents.state, contents.state
        changes: list[Attribute] = [(self, "contents", contents)]
        if isinstance(before, SelfAttentionState) and isinstance(state, SelfAttentionState):
            lease = state.buffers.lease
            if lease is not None and lease is before.buffers.lease:
                changes += lease.renew(state.version, before.version, min(state.slot(state.length)))
        return changes

    def check_room(self, tokens: int) -> None:
        """Raises CacheFullError where so many tokens more may not be cached."""
        most = self.spec.max_length
        if most is not None and self.cached_length + tokens > most:
            raise CacheFullError(
                f"tokens: expected at most {most} in the cache (max_cache_length), got {tokens} to reserve beside the "
                f"{self.cached_length} that it has"
            )

    def make_room(self, tokens: int) -> None:
        """Reserves slots for so many tokens more."""
        state = self.contents.settled
        # With the evicted tokens that `truncate` may need again.
        reserved = tokens + (0 if state is None else max(state.length - state.stored))
        contents = self.contents._replace(reserved=reserved)
        if state is None or state.buffers.key.requires_grad or state.buffers.capacity >= reserved:
            self.put(contents)
            return
        fresh = moved(state, reserved, state.stored)
        slots, before = fresh.buffers.capacity, state.buffers.capacity
        logger.debug("reserved: %d slots a row (before: %d), %d bytes", slots, before, fresh.buffers.nbytes)
        self.put(contents._replace(state=fresh))

    def freeze_layout(self) -> Self:
        """Lays out the cache for compiled steps, which then are one graph at any length.

        They use the source that is kept now, and the weights that it was projected by. Any eager call, or operation,
        puts the tokens back in order. Raises ArgumentError for a cache without `max_length`, whose shapes
        cannot be fixed.
        """
        if self.spec.max_length is None:
            raise ArgumentError(
                "max_length: expected a number, so that shapes can be fixed, got None; "
                "build the module with max_cache_length"
            )
        state, source = self.contents.settled, self.contents.source
        if source is not None:
            # A copy: compiled steps compare by content, and the caller may change the kept tensor in place.
            source = self._static_source = source.mapped(lambda t: mark_static_address(t.clone()))
        static = None if state is None else StaticLayout.of(state, self.spec)
        self.contents = self.contents._replace(state=static, source=source)
        return self

    def allocate(self, batch: int, tokens: int, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        """Begins anew, with buffers for so many tokens of each row at once rather than with the first ones that come.

        From then on other rows, dtypes and devices are refused.
        """
        like = torch.empty(batch, self.num_kv_heads, 0, self.head_dim, dtype=dtype, device=device)
        self.put(CacheContents(SelfAttentionState.empty(like, self.num_sinks)))
        self.reserve(tokens)
