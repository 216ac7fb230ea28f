"""Standalone cache, filled by the caller without a model: keys and values of layers by number."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from ..codecs import CacheDtypes, codec_names
from ..errors import MAX_LAYERS, ArgumentError, CacheStateError, DeviceError, DtypeError, ShapeError, shown
from ..masks import Rule
from .cached_layer import CachedLayer
from .cross_kv import CrossKV
from .holder import CacheSlot
from .layer import LayerCache
from .lease import check_no_recompute
from .operations import CacheOperations
from .state import check_unrecorded
from .static_layout import compiled_layout
from .step import Step

Kind = Literal["self", "cross"]
"""Whether keys and values are of a layer's own tokens, or of the source that its cross-attention reads."""


class Expected(NamedTuple):
    """Dtype and device of tensors before there is any; None: as the first ones that come."""

    dtype: torch.dtype | None = None
    device: torch.device | None = None

    @classmethod
    def of(cls, dtype: torch.dtype | None, device: torch.device | str | None) -> "Expected":
        """With the device by its index, as tensors tell it. Raises ArgumentError for anything but a float dtype."""
        if dtype is not None and (type(dtype) is not torch.dtype or not dtype.is_floating_point):
            raise ArgumentError(f"dtype: expected None or a float dtype, got {shown(dtype)}")
        return cls(dtype, None if device is None else torch.empty(0, device=device).device)


def new_layers(
    num_layers: int, num_kv_heads: int, head_dim: int, max_length: int | None, cache_dtype: CacheDtypes = None
) -> list[LayerCache]:
    """An empty cache for each layer.

    Raises ArgumentError unless all are whole numbers of at least 1, and for a `cache_dtype` that there is not.
    """
    names = codec_names(cache_dtype)
    sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    for name, size in (sizes if max_length is None else {**sizes, "max_length": max_length}).items():
        if type(size) is not int or size < 1:
            raise ArgumentError(f"{name}: expected a whole number of at least 1, got {shown(size)}")
    if num_layers > MAX_LAYERS:
        raise ArgumentError(f"num_layers: expected at most {MAX_LAYERS:,}, got a larger number")
    return [LayerCache(num_kv_heads, head_dim, max_length=max_length, cache_dtype=names) for _ in range(num_layers)]


class StandaloneCache(CacheOperations):
    """The operations of a cache whose layers have numbers: to append keys and values, and to get them."""

    _numbered: Sequence[LayerCache]
    """The layers by number; none where a model fills them."""
    _expected: Expected

    def update(self, layer: int, kind: Kind, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends `keys` and `values` [B, G, L, D] to one layer, and returns all that it then has.

        "self" appends new tokens: in place, over buffers allocated at first use, and what is returned is a view; while
        gradients are being recorded, into tensors of their own, which carry the graph. "cross" replaces the keys and
        values of the source by these as they are, uncopied; where sources of unequal length are joined, zeros follow
        the shorter ones. Layers that are never updated cost nothing. In a compiled call over a layout that
        `freeze_layout` fixed, what is returned are the whole buffers [B, G, max_length, D], with the token of position
        `p` in slot `p` and zeros where there is none yet. A cache with a `cache_dtype` keeps both kinds as records, and
        returns the numbers that these stand for.

        Raises, before anything changes: ArgumentError for a layer or kind that there is not; ShapeError, DtypeError or
        DeviceError for tensors that do not continue the cached ones; CacheFullError past `max_length`; and
        CacheStateError where a model fills the cache.
        """
        cache = self._chosen(layer, kind)
        _check_pair(cache, keys, values)
        _check_fits(self._like(cache), self._expected, keys)
        static = compiled_layout(cache.contents.state)
        if kind == "self" and static is not None and cache.max_length is not None:
            return static.update(keys, values, cache.max_length)
        check_no_recompute()
        if kind == "cross":
            cached = CachedLayer.of(CacheSlot(cache), cache)
            if cache.spec.cache_dtype is not None:
                check_unrecorded(keys, values)
            source = CrossKV.given(keys, values, cache.spec.coding(keys.dtype))
            cached.contents = cached.before._replace(source=source)
            cached.publish()
        elif keys.shape[2]:
            _append(cache, keys, values)
        elif cache.contents.state is None:
            return keys, values
        return self.get(layer, kind)

    def get(self, layer: int, kind: Kind, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, cached_length, D] of one layer, or the first `length` tokens of them.

        Raises ArgumentError for a layer or kind that there is not and for more tokens than are cached, CacheStateError
        where nothing is cached yet, or a model fills the cache.
        """
        cache = self._chosen(layer, kind)
        state, source = cache.contents.state, cache.contents.source
        if kind == "self" and state is not None:
            pair = cache["key"], cache["value"]
        elif kind == "cross" and source is not None:
            pair = source.keys_and_values()
        else:
            raise CacheStateError(f"layer, kind: layer {layer} holds nothing of kind {kind!r} yet; update() it first")
        if length is None:
            return pair
        cached = pair[0].shape[2]
        if type(length) is not int or not 0 <= length <= cached:
            raise ArgumentError(
                f"length: expected a whole number from 0 to {cached}, as is cached, got {shown(length)}"
            )
        return pair[0][:, :, :length], pair[1][:, :, :length]

    @property
    def initialized(self) -> bool:
        """Whether there are rows: anything was allocated, here or, after `offload`, elsewhere."""
        return self.batch is not None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves all tensors to a device, a float dtype, or both; `update` then expects the same.

        Raises ArgumentError for another dtype.
        """
        given = Expected.of(dtype, device)
        super().to(device, dtype)
        self._expected = Expected(given.dtype or self._expected.dtype, given.device or self._expected.device)
        return self

    def _chosen(self, layer: int, kind: Kind) -> LayerCache:
        layers = self._numbered
        if not layers:
            raise CacheStateError(
                "layer: expected a cache whose layers have numbers, as KVCache(num_layers=...) makes it, got that of a "
                "model, by module path; the model's own calls fill it"
            )
        if type(layer) is not int or not 0 <= layer < len(layers):
            raise ArgumentError(f"layer: expected a whole number from 0 to {len(layers) - 1}, got {shown(layer)}")
        if kind not in ("self", "cross"):
            raise ArgumentError(f"kind: expected 'self' or 'cross', got {shown(kind)}")
        return layers[layer]

    def _like(self, cache: LayerCache) -> Tensor | None:
        """Some cached keys: the layer's own, else any other layer's; None where there are none."""
        like = cache.contents.like
        if like is not None:
            return like
        return next((other for layer in self._numbered if (other := layer.contents.like) is not None), None)


def _append(cache: LayerCache, keys: Tensor, values: Tensor) -> None:
    cached = CachedLayer.of(CacheSlot(cache), cache)
    cached.before.check_batch(keys.shape[0])
    tokens = Step.of(keys[:, 0], None)
    step = tokens.following(cached.before.row_lengths, Rule(True, cache.window_size, cache.num_sinks))
    _, cached.contents = cached.append(keys, values, step)
    cached.publish()


def _check_pair(cache: LayerCache, keys: Tensor, values: Tensor) -> None:
    for name, tensor in (("keys", keys), ("values", values)):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4 or (tensor.shape[1], tensor.shape[3]) != (cache.num_kv_heads, cache.head_dim):
            raise ShapeError(
                f"{name}: expected shape [B, {cache.num_kv_heads}, L, {cache.head_dim}], got {list(tensor.shape)}"
            )
    if values.shape != keys.shape:
        raise ShapeError(f"values: expected shape {list(keys.shape)}, as keys, got {list(values.shape)}")
    if not keys.is_floating_point():
        raise DtypeError(f"keys: expected a float dtype, got {keys.dtype}")
    if values.dtype != keys.dtype:
        raise DtypeError(f"values: expected {keys.dtype}, as keys, got {values.dtype}")
    if values.device != keys.device:
        raise DeviceError(f"values: expected to be on {keys.device}, as keys, got {values.device}")


def _check_fits(like: Tensor | None, expected: Expected, keys: Tensor) -> None:
    """`like` are cached keys; before there are any, the dtype and device of the construction count."""
    dtype, device = expected if like is None else (like.dtype, like.device)
    if dtype is not None and keys.dtype != dtype:
        raise DtypeError(f"keys: expected {dtype}, as the cache, got {keys.dtype}; move the cache with to(dtype=...)")
    if device is not None and keys.device != device:
        raise DeviceError(f"keys: expected to be on {device}, as the cache, got {keys.device}; move it with to(device)")
    if like is not None and keys.shape[0] != like.shape[0]:
        raise ShapeError(
            f"keys: expected {like.shape[0]} rows, as the cache, got {keys.shape[0]}; clear() it to begin anew"
        )
