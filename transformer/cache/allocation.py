"""Memory that the caches of a model will allocate, computed before there is a token, or even a model."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from ..codecs import CacheDtypes, codec_names
from ..errors import ArgumentError, shown
from .holder import CacheHolder, holders, readers
from .spec import CacheSpec
from .standalone import Kind


@dataclass(frozen=True)
class LayerPlan(CacheSpec):
    """Specification of one layer's cache with its dtype, by which its memory is counted.

    `kind` is "cross" for attention over a source, which then is all that the layer keeps.
    """

    dtype: torch.dtype
    kind: Kind = field(default="self", kw_only=True)
    budget: int | None = field(default=None, kw_only=True)
    """The most tokens of each row after a call; None: no such limit."""

    @classmethod
    def of(cls, holder: CacheHolder, kind: Kind) -> "LayerPlan":
        """The plan of a module's cache, by the module's present options."""
        budget = None if holder.budget is None else holder.budget.tokens
        return cls(**holder.cache_spec.fields(), dtype=holder.kv_dtype, kind=kind, budget=budget)

    def planned_bytes(self, batch: int, length: int, source_length: int | None) -> int:
        """The most bytes that are allocated once `batch` rows have seen `length` tokens.

        Raises ArgumentError where the cache cannot hold so many, or a source is read whose length is not given.
        """
        if self.kind == "self":
            cached = length if self.window_size is None else min(length, self.window_size + self.num_sinks)
            if self.budget is not None and cached > self.budget:
                return self.compressed_bytes(batch, self.budget, self.dtype)
            return self.most_bytes(batch, length, self.dtype)
        if source_length is None:
            raise ArgumentError("source_length: expected a number, as the model reads a source, got None")
        return self.nbytes(batch, source_length if length else 0, self.dtype)


@runtime_checkable
class LayerPlans(Protocol):
    """A model that lists the plans of its caches, or the configuration of a model that need not exist yet."""

    def layer_plans(self) -> Iterable[LayerPlan]:
        """The plan of each layer that keeps a cache: a decoder layer that reads a source has two."""


def cache_bytes(
    model: nn.Module | LayerPlans,
    batch: int,
    length: int,
    source_length: int | None = None,
    *,
    cache_dtype: CacheDtypes = None,
) -> int:
    """Bytes of keys and values that a model's caches have allocated after `batch` rows have seen `length` tokens.

    With `max_cache_length` this is what is then allocated, to the byte. Without, it is the most that growth by doubling
    comes to, however the tokens are cut into calls; some cut comes to just that. Each module is taken in the mode that
    it was built for: sliding where it has a `window_size`, else expanding. A model whose caches are off, or in
    `train()`, is taken as `enable_cache()` would leave it; of other modules those without `use_kv_cache` keep nothing.
    Rows that share a prompt take less. Those that read a source keep it projected, all `source_length` tokens. (The
    copy that is kept of a source that was made in inference mode comes on top.) With a `cache_dtype` every layer is
    taken to have it; None: each its own. With a `cache_budget` it is the most that is allocated after a call, with the
    positions of the tokens that are kept; during a call all of its tokens are cached too, and what a policy needs of
    earlier queries comes on top.

    Raises ArgumentError for a model without attention, numbers that are no whole ones, a `length` that a layer cannot
    hold, a missing `source_length`, and a `cache_dtype` that there is not.
    """
    smallest = {"batch": 1, "length": 0, "source_length": 0}
    given = {"batch": batch, "length": length, "source_length": 0 if source_length is None else source_length}
    for name, number in given.items():
        if type(number) is not int or number < smallest[name]:
            raise ArgumentError(f"{name}: expected a whole number of at least {smallest[name]}, got {shown(number)}")
    names, plans = codec_names(cache_dtype), _plans(model)
    if names is not None:
        plans = (replace(plan, cache_dtype=names) for plan in plans)
    return sum(plan.planned_bytes(batch, length, source_length) for plan in plans)


def _plans(model: nn.Module | LayerPlans) -> Iterable[LayerPlan]:
    if isinstance(model, nn.Module):
        listing = [module for module in model.modules() if isinstance(module, LayerPlans)]
        listed = {id(module) for lister in listing for module in lister.modules()}
        found, reading = holders(model).values(), set(readers(model))
        own = [holder for holder in found if holder.use_kv_cache and id(holder) not in listed]
        plans = [LayerPlan.of(holder, "cross" if holder in reading else "self") for holder in own]
        return [*plans, *(plan for lister in listing for plan in lister.layer_plans())]
    if isinstance(model, LayerPlans):
        return model.layer_plans()
    raise ArgumentError(f"model: expected a module, or what lists its layer_plans(), got {type(model).__name__}")
