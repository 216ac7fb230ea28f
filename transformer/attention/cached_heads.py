"""Cache of the heads of one attention module: where it is, what of it a call goes on from, and whom a query sees."""

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import Self

from ..cache import (
    CacheCall,
    CacheContents,
    CacheHolder,
    CacheSlot,
    CacheSpec,
    LayerCache,
    Lengths,
    active_call,
    inside_a_call,
    sliding_window,
)
from ..masks import Rule
from ..positions import Rotation, ScoreBias
from . import checks
from .heads import ProjectedHeads


class CachedHeads(ProjectedHeads, CacheHolder):
    """Projections with a cache of their keys and values, in `slot`, and the options that decide what it holds."""

    apply_causal_mask: bool
    use_kv_cache: bool
    window_size: int | None
    num_sinks: int
    max_cache_length: int | None
    position: Rotation | ScoreBias | None
    slot: CacheSlot

    def keeps(self, call: CacheCall | None) -> bool:
        """Whether this module keeps keys and values, in a call (None: on its own)."""
        return self.use_kv_cache if call is None else call.slot(self) is not None

    def contents(self, call: CacheCall | None) -> CacheContents | None:
        """What the cache of this module holds, in a call (None: on its own); None where there is nothing."""
        if call is not None:
            return call.contents(self)
        cache = self.slot.cache if self.use_kv_cache else None
        return None if cache is None else cache.contents

    def rule(self, contents: CacheContents | None, new_lengths: Lengths, expanding_context: bool | None = None) -> Rule:
        """Whom a query sees in a call whose rows gain so many tokens, after what the cache holds."""
        sliding = self.window_size is not None if expanding_context is None else not expanding_context
        window = sliding_window(contents, new_lengths, self.window_size) if sliding else None
        return Rule(self.apply_causal_mask, window, self.num_sinks)

    def traced_rule(self, expanding_context: bool | None = None) -> Rule:
        """The same in a traced call without a cache: a window as long as the chunk itself hides nothing."""
        sliding = self.window_size is not None if expanding_context is None else not expanding_context
        return Rule(self.apply_causal_mask, self.window_size if sliding else None, self.num_sinks)

    @property
    def compiles(self) -> bool:
        """Whether this is a step that is being compiled, over a cache that `freeze_layout` has laid out for it."""
        cache = self.slot.cache if self.use_kv_cache else None
        if cache is None or (cache.static is None and cache.static_source is None):
            return False
        # A call that is under way says where its tokens go: a generation has slots of its own.
        return not inside_a_call()

    @property
    def learned_bias(self) -> bool:
        """Whether its position scheme adds numbers to the scores that training changes."""
        return isinstance(self.position, ScoreBias) and self.position.learned

    # --- the cache ------------------------------------------------------------------------------------------------

    @property
    def kv_cache(self) -> LayerCache | None:
        """What this module has seen and still holds: None before the first cached call. Set None to forget.

        Within a generation, such as in a forward hook, it is that generation's.
        """
        call = active_call()
        return self.slot.cache if call is None else call.cache(self)

    @kv_cache.setter
    def kv_cache(self, cache: LayerCache | None) -> None:
        if cache is not None:
            checks.check_cache(cache, self.cache_spec)
        self.slot.cache = cache

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to()`, `.half()` and their kin: a live cache goes along with the weights.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.slot.cache is not None:
            self.slot.cache.apply(fn)
        return self

    @property
    def cache_spec(self) -> CacheSpec:
        """The specification of the cache that this module begins a conversation with."""
        return CacheSpec(
            self.num_groups,
            self.head_dim,
            num_sinks=self.num_sinks,
            window_size=self.window_size,
            max_length=self.max_cache_length,
            position=repr(self.position),
        )

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of the keys' weights; float32 where these are packed."""
        floats = (weight.dtype for weight in self.k_proj.parameters() if weight.is_floating_point())
        return next(floats, torch.float32)
