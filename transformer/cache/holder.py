"""Modules that have a cache: their interface, the slot that keeps it, and the search for them through wrappers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import ref

import torch
from torch import nn

from ..errors import ArgumentError
from .budget import CacheBudget
from .layer import LayerCache
from .spec import CacheSpec

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names under which torch.compile, checkpoint_wrapper and FSDP1 keep the module that they wrap."""

ADAPTED = "base_model.model."
"""The name under which peft keeps the model that it adapts."""


class CacheSlot:
    """The place of one layer's cache: in an attention module, in a conversation outside, or in a generation.

    `cache` is None before the first cached call. `caller` refers weakly to the call that works on it now, if any.
    """

    __slots__ = ("__weakref__", "cache", "caller")

    def __init__(self, cache: LayerCache | None = None) -> None:
        self.cache = cache
        self.caller: ref[Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is in no call.
        return CacheSlot, (self.cache,)


class CacheHolder(ABC):
    """A module with a cache of its own, in `slot`."""

    use_kv_cache: bool
    slot: CacheSlot
    budget: CacheBudget | None = None
    """The most tokens after a call, and the policy that says which; None: all stay."""

    @property
    @abstractmethod
    def kv_cache(self) -> LayerCache | None:
        """The cache; None before its first token. Set None to forget, or another cache to continue that."""

    @kv_cache.setter
    @abstractmethod
    def kv_cache(self, cache: LayerCache | None) -> None: ...

    @property
    @abstractmethod
    def cache_spec(self) -> CacheSpec:
        """The specification of the cache that this module begins a conversation with."""

    def new_cache(self) -> LayerCache:
        """An empty cache of that specification."""
        return LayerCache.of(self.cache_spec)

    @property
    @abstractmethod
    def kv_dtype(self) -> torch.dtype:
        """The dtype of its keys and values, which is that of its weights."""


class ReadsSource(ABC):
    """A module that calls some holders with a source: their caches grow with the source, not with the tokens."""

    @abstractmethod
    def readers(self) -> Iterable[CacheHolder]:
        """The holders that it calls so."""


def holders(model: nn.Module) -> dict[str, CacheHolder]:
    """Every holder in a model, each once, by its path in the model without wrappers.

    Raises ArgumentError where there is none.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = {path_of(name): module for name, module in model.named_modules() if isinstance(module, CacheHolder)}
    if not found:
        raise ArgumentError(f"model: expected one with attention modules of this library, got {type(model).__name__}")
    return found


def readers(model: nn.Module) -> Iterator[CacheHolder]:
    """Every holder that some module in a model calls with a source."""
    for module in model.modules():
        if isinstance(module, ReadsSource):
            yield from module.readers()


def path_of(name: str) -> str:
    """A module's name without the names of wrappers."""
    name = name.removeprefix(ADAPTED)
    return ".".join(part for part in name.split(".") if part not in WRAPPED)
