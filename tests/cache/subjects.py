"""Subjects of random programs: one layer, or a small model of mixed layers, each with its oracle."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from tests.blocks.loops import StackConversation
from tests.blocks.stacks import Layer, make, options_of
from tests.cache.budgets import BudgetedConversation
from tests.oracle import Options
from tests.oracle_operations import EditableConversation
from tests.setups import build
from transformer import KVCache, LayerCache
from transformer.cache.policies import AnyPolicy

Cache = LayerCache | KVCache


def first_values(_keys: Tensor, values: Tensor, *, positions: Tensor) -> Tensor:
    """A policy: the first numbers of the values."""
    assert positions.shape == values.shape[:3]
    return values[..., 0]


class Subject(ABC):
    """A module between calls: its conversations are kept outside, and put into it one at a time."""

    caches: type[LayerCache] | type[KVCache]
    module: nn.Module
    layers: list[EditableConversation]
    """Of every layer, with nothing said yet."""
    limits: list[int | None]
    """The most tokens that each layer may hold."""
    reads = False
    """Whether it has cross-attention."""

    @abstractmethod
    def empty(self) -> Cache:
        """A conversation without tokens."""

    @abstractmethod
    def inside(self, cache: Cache) -> AbstractContextManager[None]:
        """The conversation is in the module."""

    @abstractmethod
    def copied_along(self, cache: Cache) -> Cache:
        """The conversation of a deep copy of the module that it is in."""

    @abstractmethod
    def run(self, x: Tensor, mask: Tensor | None, mode: bool | None, source: Tensor) -> Tensor:
        """One call, padding put out."""

    @abstractmethod
    def expected(
        self, layers: Sequence[EditableConversation], x: Tensor, mask: Tensor | None, mode: bool | None, source: Tensor
    ) -> Tensor:
        """The same by plain loops, which move `layers` on."""

    @abstractmethod
    def parts(self, cache: Cache) -> list[LayerCache | None]:
        """The cache of each layer, where it has one."""


class OneLayer(Subject):
    """One attention module and its `kv_cache`."""

    caches = LayerCache

    def __init__(self, options: Options, limit: int | None, budget: tuple[int, AnyPolicy] | None = None) -> None:
        kind = {1: "MQA", options.num_heads: "MHA"}.get(options.num_groups, "GQA")
        self.module = build(options, kind, max_cache_length=limit, cache_budget=budget)
        if any(options.stored):
            # Records carry no gradients; where nothing is to be learned, calls may be within `enable_grad`.
            self.module.requires_grad_(False)
        self.layers, self.limits = [EditableConversation(self.module, options)], [limit]
        if budget is not None:
            self.layers = [BudgetedConversation(self.module, options, budget)]

    def empty(self) -> Cache:
        return self.module.new_cache()

    @contextmanager
    def inside(self, cache: Cache) -> Iterator[None]:
        self.module.kv_cache = cache
        try:
            yield
        finally:
            self.module.kv_cache = None

    def copied_along(self, cache: Cache) -> Cache:
        with self.inside(cache):
            return copy.deepcopy(self.module).kv_cache

    def run(self, x: Tensor, mask: Tensor | None, mode: bool | None, source: Tensor) -> Tensor:
        return self.module(x, None, mode, attention_mask=mask)

    def expected(
        self, layers: Sequence[EditableConversation], x: Tensor, mask: Tensor | None, mode: bool | None, source: Tensor
    ) -> Tensor:
        return layers[0].call(x, mask, mode)[0]

    def parts(self, cache: Cache) -> list[LayerCache | None]:
        return [cache]


class WholeModel(Subject):
    """A stack, and the `KVCache` of all of its layers."""

    caches = KVCache

    def __init__(
        self, layers: Sequence[Layer], scheme: str, limit: int | None, stored: tuple[str | None, str | None]
    ) -> None:
        self.module = make(layers, scheme, stored=stored)
        if any(stored):
            self.module.requires_grad_(False)
        options = [options_of(layer, scheme, stored=stored) for layer in layers]
        self.conversation = StackConversation(self.module, options, "before", "silu")
        self.layers = [
            EditableConversation(b.attention, own) for b, own in zip(self.module.blocks, options, strict=True)
        ]
        self.limits = [limit] * len(layers)
        for block in self.module.blocks:
            for attention in filter(None, (block.attention, block.cross_attention)):
                attention.max_cache_length = limit
        self.reads = any(layer.reads for layer in layers)
        self.names = [f"blocks.{number}.attention" for number in range(len(layers))]

    def empty(self) -> Cache:
        return KVCache.from_model(self.module).remove(self.module)

    @contextmanager
    def inside(self, cache: Cache) -> Iterator[None]:
        cache.install(self.module)
        try:
            yield
        finally:
            cache.remove(self.module)

    def copied_along(self, cache: Cache) -> Cache:
        with self.inside(cache):
            model = copy.deepcopy(self.module)
        return KVCache.from_model(model).remove(model)

    def run(self, x: Tensor, mask: Tensor | None, mode: bool | None, source: Tensor) -> Tensor:
        read = {"source": source} if self.reads else {}
        out = self.module(x, expanding_context=mode, attention_mask=mask, **read)
        return out if mask is None else out.masked_fill(~mask[..., None], 0.0)

    def expected(
        self, layers: Sequence[EditableConversation], x: Tensor, mask: Tensor | None, mode: bool | None, source: Tensor
    ) -> Tensor:
        self.conversation.conversations = list(layers)
        return self.conversation.call(x, mask, mode, source if self.reads else None)

    def parts(self, cache: Cache) -> list[LayerCache | None]:
        return [cache.layers.get(name) for name in self.names]
