"""Cache for transformers' own models over our KV cache: its operations work on their models, in their `generate`.

transformers' batches are columns: padding has a column of its own, which their masks hide. Columns are therefore stored
as they come, so all rows have one length here, and `length` counts padding too.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig, cache_utils

from ..cache import CacheSlot, KVCache, LayerCache
from ..errors import ArgumentError, ConfigurationError
from .cache_layers import SourceLayer, TokenLayer

_KEEPS_NOTHING: Any = getattr(cache_utils, "DummyLayer", ())
"""transformers' class for layers that read the keys of others, from the release on that has it."""


class TransformersCache(EncoderDecoderCache):  # type: ignore[misc,unused-ignore]
    """Keys and values of a model of transformers, in a `KVCache`.

    Given to its calls, or to `generate`, as `past_key_values` (`cache` from transformers 5.24 on). Windows keep `W`
    tokens, new tokens are appended in place, and the projected source of cross-attention is kept beside its layer's
    tokens. Operations on `kv_cache` (`truncate`, `select`, `fork`, `save`) are operations on this cache.

    Args:
        config: that of the model.
        kv_cache: a conversation to go on with, as `fork` or `KVCache.load` gives it; None: a new one.

    Raises ConfigurationError for a model with layers that keep anything but keys and values of tokens (linear
    attention, indexers), and ArgumentError for a conversation of other layers and arguments of other types.
    """

    def __init__(self, config: PreTrainedConfig, kv_cache: KVCache | None = None) -> None:
        _check_types(config, kv_cache)
        windows = _windows(config)
        caches = {} if kv_cache is None else kv_cache.layers
        _check_continues(caches, windows)
        slots = [CacheSlot(caches.get(str(number))) for number in range(len(windows))]
        # As Any: the attributes of the base class are declared as its own kinds of cache and of layers.
        tokens: Any = [TokenLayer(slot, window) for slot, window in zip(slots, windows, strict=True)]
        sources: Any = [SourceLayer(slot) for slot in slots]
        self.kv_cache = KVCache.of_slots({str(number): slot for number, slot in enumerate(slots)})
        Cache.__init__(self, layers=tokens)
        caches_of: Any = Cache(layers=tokens), Cache(layers=sources), _Projected(sources)
        self.self_attention_cache, self.cross_attention_cache, self.is_updated = caches_of

    def __repr__(self) -> str:
        return f"TransformersCache({self.kv_cache!r})"

    @property
    def batch_size(self) -> int:
        """Rows of the running batch; -1 before its first token."""
        batch = self.kv_cache.batch
        return -1 if batch is None else batch

    def reset(self) -> None:
        """Forgets everything."""
        self.kv_cache.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest `-tokens_to_remove` tokens, in all layers or in none.

        Raises ArgumentError for a positive number, or more tokens than there are, and CacheStateError where a window
        has evicted tokens that it would need again.
        """
        if tokens_to_remove > 0:
            raise ArgumentError(f"tokens_to_remove: expected 0 or a negative number, got {int(tokens_to_remove)}")
        if tokens_to_remove:
            self.kv_cache.truncate(self.kv_cache.length + int(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts rows into this order, and repeats those that are repeated: beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, in this order."""
        self.kv_cache.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row, next to itself."""
        rows = torch.arange(self.kv_cache.batch or 0, device="cpu")
        if len(rows):
            self.kv_cache.select(rows.repeat_interleave(repeats))


class _Projected(MutableMapping[int, bool]):
    """Whether the source of a layer's cross-attention is in the cache, by the layer's number."""

    def __init__(self, layers: Sequence[SourceLayer]) -> None:
        self._layers = layers

    def __getitem__(self, number: int) -> bool:
        return self._layers[number].is_initialized

    def __setitem__(self, number: int, projected: bool) -> None:
        # True says what `update` has made true.
        if not projected:
            self._layers[number].reset()

    def __delitem__(self, number: int) -> None:
        self._layers[number].reset()

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self._layers)))

    def __len__(self) -> int:
        return len(self._layers)


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """The window of each layer, as transformers' own cache has it."""
    windows: list[int | None] = []
    for number, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is cache_utils.DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        elif type(layer) is cache_utils.DynamicLayer or isinstance(layer, _KEEPS_NOTHING):
            windows.append(None)
        else:
            raise ConfigurationError(
                f"config: expected layers that keep keys and values of tokens, got {type(layer).__name__} in layer "
                f"{number}; use transformers' own cache"
            )
    # T5's number of decoder layers is not the one that transformers counts.
    decoder_layers = getattr(config, "num_decoder_layers", None) or 0
    return windows + [None] * (decoder_layers - len(windows))


def _check_types(config: object, kv_cache: object) -> None:
    if not isinstance(config, PreTrainedConfig):
        raise ArgumentError(
            f"config: expected the configuration of a model of transformers, got {type(config).__name__}; give "
            "model.config"
        )
    if not isinstance(kv_cache, KVCache | None):
        raise ArgumentError(
            f"kv_cache: expected a KVCache or None, got {type(kv_cache).__name__}; give cache.kv_cache.fork() or "
            "KVCache.load(file)"
        )


def _check_continues(caches: Mapping[str, LayerCache], windows: Sequence[int | None]) -> None:
    """Raises for a conversation of other layers than those of the model."""
    for name, cache in caches.items():
        known = name.isdecimal() and int(name) < len(windows)
        if not known or cache.window_size != windows[int(name)] or cache.num_sinks:
            expected = f"window_size={windows[int(name)]}" if known else f"layers 0 to {len(windows) - 1}"
            raise ArgumentError(
                f"kv_cache: expected {expected} without sinks, as the model has, got layer {name!r} with "
                f"window_size={cache.window_size} and {cache.num_sinks} sinks"
            )
