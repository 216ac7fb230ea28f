"""Layers of the cache for transformers' models: one layer's tokens, and its projected source, in one `LayerCache`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..cache import CachedLayer, CacheSlot, CrossKV, LayerCache, Step
from ..errors import CacheStateError, ShapeError
from ..masks import Rule


class _Layer(CacheLayerMixin):  # type: ignore[misc,unused-ignore]
    """The slot of a layer, whose cache the first keys make: they tell the number of heads and their width."""

    is_croppable = True
    is_sliding = False

    def __init__(self, slot: CacheSlot) -> None:
        # Not the base's: its keys and values are attributes, here they are read from the slot.
        self._slot = slot

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: `update` does it."""

    def get_max_length(self) -> int:
        """-1: none."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same, by the name of earlier releases."""
        return self.get_max_length()

    def _cache(self, keys: Tensor, values: Tensor, window: int | None) -> LayerCache:
        """The cache that these keys and values [B, G, L, D] continue. Raises ShapeError where they do not."""
        if values.shape != keys.shape:
            raise ShapeError(
                f"value_states: expected {list(keys.shape)}, as the keys, got {list(values.shape)}; keys and values of "
                "different widths need transformers' own cache"
            )
        cache = self._slot.cache or LayerCache(keys.shape[1], keys.shape[3], window_size=window)
        batch = cache.contents.batch
        expected = [keys.shape[0] if batch is None else batch, cache.num_kv_heads, cache.head_dim]
        if [keys.shape[0], keys.shape[1], keys.shape[3]] != expected:
            raise ShapeError(
                f"key_states: expected {expected[0]} rows of {expected[1]} heads of width {expected[2]}, as in the "
                f"cache, got {list(keys.shape)}; reset() it, or use one cache per batch"
            )
        return cache


class TokenLayer(_Layer):
    """Tokens of one layer, in order of their columns; with a window the last `W` of them.

    Args:
        slot: the place of its cache.
        window: `W`, or None.
    """

    def __init__(self, slot: CacheSlot, window: int | None) -> None:
        super().__init__(slot)
        self._window = window
        self.is_sliding = window is not None

    @property
    def is_initialized(self) -> bool:  # type: ignore[override,unused-ignore]
        """Whether anything was cached."""
        return self._slot.cache is not None

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override,unused-ignore]
        """[B, G, cached_length, D]."""
        return None if self._slot.cache is None else self._slot.cache["key"]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override,unused-ignore]
        """[B, G, cached_length, D]."""
        return None if self._slot.cache is None else self._slot.cache["value"]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends [B, G, L, D], and returns what the new tokens may look at, as `get_mask_sizes` says beforehand.

        Raises ShapeError, DtypeError or DeviceError for tensors that do not continue the cached ones, and
        CacheStateError for rows of different lengths.
        """
        cache, window, new = self._cache(key_states, value_states, self._window), self._window, key_states.shape[2]
        visible = self.get_mask_sizes(new)[0]
        layer = CachedLayer.of(self._slot, cache)
        # A chunk longer than its window in two parts: `truncate` then reaches back over a whole window.
        parts = [new] if window is None or new <= window else [new - window, window]
        pairs: list[tuple[Tensor, Tensor]] = []
        for key, value in zip(key_states.split(parts, 2), value_states.split(parts, 2), strict=True):
            step = Step.of(key[:, 0], None).following(layer.contents.row_lengths, Rule(True, window))
            view, layer.contents = layer.append(key, value, step)
            pairs.append((key, value) if pairs else (view.key, view.value))
        layer.publish()
        keys, values = pairs[0] if len(pairs) == 1 else (torch.cat(each, 2) for each in zip(*pairs, strict=True))
        return keys[:, :, -visible:], values[:, :, -visible:]

    def get_seq_length(self) -> int:
        """How many columns were seen, padding included. Raises CacheStateError for rows of different lengths, and after
        `compress`."""
        if self._slot.cache is None:
            return 0
        lengths = self._slot.cache.row_lengths
        if not lengths.uniform:
            raise CacheStateError(
                f"kv_cache: expected rows of one length, since the batches of transformers are columns, got {lengths}; "
                "select() rows of one length"
            )
        if self._slot.cache.contents.is_compressed:
            raise CacheStateError(
                "kv_cache: expected every column, as the masks of transformers count them, got a compressed one; "
                "fork() it before compress()"
            )
        return lengths[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys so many new tokens look at, themselves included, and the column of the first of them."""
        length = self.get_seq_length()
        before = length if self._window is None else min(length, self._window - 1)
        return before + int(query_length), length - before

    def get_max_length(self) -> int:
        """The window; -1 without one."""
        return -1 if self._window is None else self._window

    def reset(self) -> None:
        """Forgets the layer's tokens and its source."""
        if self._slot.cache is not None:
            self._slot.cache.clear()

    def reorder_cache(self, beam_idx: Tensor | Sequence[int]) -> None:
        """Puts rows of the layer's tokens and source into this order."""
        if self._slot.cache is not None:
            self._slot.cache.select(beam_idx)


class SourceLayer(_Layer):
    """Projected source of one layer's cross-attention. Its rows are reordered with the layer's tokens."""

    @property
    def _source(self) -> CrossKV | None:
        return None if self._slot.cache is None else self._slot.cache.source

    @property
    def is_initialized(self) -> bool:  # type: ignore[override,unused-ignore]
        """Whether there is a source."""
        return self._source is not None

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override,unused-ignore]
        """[B, G, S, D]."""
        return None if self._source is None else self._source.key

    @property
    def values(self) -> Tensor | None:  # type: ignore[override,unused-ignore]
        """[B, G, S, D]."""
        return None if self._source is None else self._source.value

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keeps [B, G, S, D] in place of the source before. Raises as that of tokens."""
        layer = CachedLayer.of(self._slot, self._cache(key_states, value_states, None))
        layer.contents = layer.contents._replace(source=CrossKV.given(key_states, value_states))
        layer.publish()
        return key_states, value_states

    def get_seq_length(self) -> int:
        """How many tokens the source has."""
        return 0 if self._source is None else self._source.key.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All tokens of the source; before there is one, as many as are asked for."""
        return self.get_seq_length() or int(query_length), 0

    def reset(self) -> None:
        """Forgets the source, which is then projected anew."""
        if self._slot.cache is not None:
            self._slot.cache.put(self._slot.cache.contents._replace(source=None))

    def reorder_cache(self, beam_idx: Tensor | Sequence[int]) -> None:
        """Nothing: the layer's tokens take the source along."""
