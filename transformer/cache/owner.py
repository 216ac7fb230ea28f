"""What a module that owns a cache promises to whoever holds the conversations of a whole model."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import nn

from ..errors import ArgumentError
from .layer import LayerCache


class CacheOwner(ABC):
    """A module with a conversation of its own, in `kv_cache`."""

    use_kv_cache: bool

    @property
    @abstractmethod
    def kv_cache(self) -> LayerCache | None:
        """The conversation; None before its first token. Set None to forget, another one to continue that."""

    @kv_cache.setter
    @abstractmethod
    def kv_cache(self, cache: LayerCache | None) -> None: ...

    @abstractmethod
    def new_cache(self) -> LayerCache:
        """An empty cache of the shape that this module would begin a conversation with."""

    @property
    @abstractmethod
    def cache_dtype(self) -> torch.dtype:
        """The dtype of its keys and values, which is that of its weights."""


class ReadsSource(ABC):
    """A module that calls some owners with a source: what these keep grows with that, not with the tokens."""

    @abstractmethod
    def readers(self) -> Iterable[CacheOwner]:
        """The owners that it calls so."""


def owners(model: nn.Module) -> dict[str, CacheOwner]:
    """Every owner in a model, each once, by its path. Raises ArgumentError where there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, CacheOwner)}
    if not found:
        raise ArgumentError(f"model: expected one with attention modules of this library, got {type(model).__name__}")
    return found
