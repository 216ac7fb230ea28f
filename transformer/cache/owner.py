"""What a module that owns a cache promises to whoever holds the conversations of a whole model."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import nn

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


def owners(model: nn.Module) -> Iterator[tuple[str, CacheOwner]]:
    """Every owner in a model, each once, by its path."""
    for name, module in model.named_modules():
        if isinstance(module, CacheOwner):
            yield name, module
