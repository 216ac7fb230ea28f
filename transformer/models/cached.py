"""Caches of a whole model: turned on and off together, and not used in training."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from typing_extensions import Self

from ..attention import Attention
from ..blocks import BlockStack
from ..cache import (
    EMPTY,
    AnyPolicy,
    CacheBudget,
    CacheCall,
    CacheHolder,
    KVCache,
    LayerPlan,
    active_call,
    exchange,
    holders,
    readers,
    run_call,
)
from ..codecs import CacheDtypes, codec_names
from ..errors import MAX_SIZE, ArgumentError, CacheStateError, ConfigurationError, shown
from ..generation import CacheProvider, Session, UseCache
from .room import check_cache_room, too_long
from .tied import TiedModel
from .wrappers import ForWrappers

T = TypeVar("T")


class CachedModel(TiedModel, ForWrappers, CacheProvider):
    """A model whose decoder blocks may keep their keys and values from call to call.

    Caches are off in a new model. While they are on, calls in `eval()` read and fill them. Calls in `train()` neither
    read nor change them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cached_layers: frozenset[int] = frozenset()

    @abstractmethod
    def decoder_blocks(self) -> Sequence[nn.Module]:
        """The blocks that may have caches, in order, as they are in the stack, wrappers included."""

    @staticmethod
    def in_one_call(stack: BlockStack, function: Callable[..., T], *arguments: Any) -> T:
        """Result of `function`, which runs `stack` and a head; if either raises, the caches are unchanged."""
        # A compiled step commits its own writes.
        if active_call() is None and not torch.compiler.is_compiling() and stack.keeps_cache():
            return run_call(CacheCall(), function, *arguments)
        return function(*arguments)

    @property
    def kv_cache(self) -> KVCache | None:
        """The current conversation; None while caches are off. Set None to clear it, or another one to install that.

        Setting another one raises as `KVCache.install` does, and CacheStateError while caches are off.
        """
        return self._conversation() if self._cached_layers else None

    @kv_cache.setter
    def kv_cache(self, conversation: KVCache | None) -> None:
        if conversation is None:
            self.clear_cache()
            return
        if not isinstance(conversation, KVCache):
            raise ArgumentError(f"kv_cache: expected a KVCache or None, got {type(conversation).__name__}")
        if not self._cached_layers:
            raise CacheStateError("kv_cache: expected caches to be on to install a conversation; enable_cache() first")
        conversation.install(self)

    def enable_cache(
        self,
        max_length: int | None = None,
        layers: Iterable[int] | None = None,
        *,
        cache_dtype: CacheDtypes = None,
        cache_budget: tuple[int, AnyPolicy] | None = None,
    ) -> Self:
        """Turns caches on: calls then append to them and read them, until `disable_cache`.

        Args:
            max_length: most tokens of a row; buffers are then allocated once (a window's at its own size). With a
                `cache_budget` it must hold the whole prompt, which is in the cache until its call is over.
            layers: indices of the layers whose keys and values are kept, by default all. With only some of them, keys
                and values of one whole sequence can be inspected, but the sequence cannot be continued.
            cache_dtype: how keys and values are stored, as in the attention modules; None: as the weights.
            cache_budget: `(tokens, policy)`, as in the attention modules: at most so many tokens of each row are cached
                after a call, those that the policy scores highest; None: all of them.

        Raises ArgumentError for numbers out of range, a `cache_dtype` that there is not and no such budget, and
        CacheStateError where the caches are not empty.
        """
        codec_names(cache_dtype)
        blocks = self.decoder_blocks()
        try:
            budget = CacheBudget.of(cache_budget, max((each.num_sinks for _, each in self._layers()), default=0))
        except ConfigurationError as error:
            raise ArgumentError(str(error)) from None
        if max_length is not None and (type(max_length) is not int or not 1 <= max_length <= MAX_SIZE):
            raise ArgumentError(f"max_length: expected a whole number from 1 to {MAX_SIZE:,}, got {shown(max_length)}")
        try:
            indices = list(range(len(blocks)) if layers is None else layers)
        except TypeError:
            indices = []
        if not indices or any(type(index) is not int or not 0 <= index < len(blocks) for index in indices):
            raise ArgumentError(f"layers: expected indices from 0 to {len(blocks) - 1}, got {shown(layers)}")
        chosen = frozenset(indices)
        # Also where caches are off: a caller may have set caches of single modules.
        caches = [attention.slot.cache for _, attention in self._layers()]
        if any(cache is not None and cache.length for cache in caches):
            raise CacheStateError("enable_cache: a conversation is under way; clear_cache() first")
        self.clear_cache()
        for _, attention in self._layers():
            window = None if attention.window_size is None else attention.window_size + attention.num_sinks
            attention.max_cache_length = max_length if max_length is None or window is None else window
            attention.cache_dtype = cache_dtype
            attention.cache_budget = budget
        self._cached_layers = chosen
        self._follow_mode()
        return self

    def disable_cache(self) -> Self:
        """Turns caches off and clears them."""
        self.clear_cache()
        for _, attention in self._layers():
            attention.max_cache_length = attention.cache_dtype = attention.cache_budget = None
        self._cached_layers = frozenset()
        self._follow_mode()
        return self

    def layer_plans(self) -> list[LayerPlan]:
        """The shape of each cache, for `cache_bytes`: those that are on, or all that `enable_cache()` would turn on."""
        sources = {id(holder) for holder in readers(self)}
        return [
            LayerPlan.of(attention, "cross" if id(attention) in sources else "self")
            for layer, attention in self._layers()
            if not self._cached_layers or layer in self._cached_layers
        ]

    def clear_cache(self) -> Self:
        """Clears the caches; the next call begins a new sequence."""
        exchange((), [(attention.slot, "cache", None) for _, attention in self._layers()])
        return self

    def train(self, mode: bool = True) -> Self:
        """As of any module; caches are off in training."""
        super().train(mode)
        self._follow_mode()
        return self

    def session(self, use_cache: UseCache, max_new_tokens: int, *, begins: bool = False) -> Session:
        """The caches of one generation: those of the model where they are on, else temporary ones.

        "auto" uses none for a single token, or where only some layers have caches. `begins`: the generation replaces
        the conversation instead of continuing it. Raises ArgumentError in `train()`, where dropout is active, and where
        only some layers have caches.
        """
        if self.training:
            raise ArgumentError("model: expected eval() mode to generate, got train(); call model.eval() first")
        found, on = self._holders(), len(self._cached_layers)
        if use_cache is True and not found:
            raise ArgumentError(
                "use_cache: expected attention modules of this library in the model's blocks, got none that can be "
                "found; register them as submodules, or give use_cache=False"
            )
        whole = on == len(self.decoder_blocks())
        if not use_cache or (use_cache == "auto" and not whole and (on or max_new_tokens == 1)):
            return Session.without_caches(found)
        if not on:
            return Session.separate(found)
        if not whole:
            raise ArgumentError(
                f"use_cache: expected caches in all layers, got them in {sorted(self._cached_layers)}; "
                "enable_cache() without layers, or give use_cache=False"
            )
        return Session.live(found, begins=begins)

    def check_room(self, session: Session, prompts: Sequence[int], new: Sequence[int]) -> None:
        """Raises ArgumentError where rows would be longer than the positions, and CacheFullError where they would not
        fit into a cache of fixed size without a window."""
        # A conversation that continues reads the last token too.
        unread = 0 if session.continues_conversation else 1
        adds = tuple(prompt + most - unread for prompt, most in zip(prompts, new, strict=True))
        sources = {id(holder) for holder in readers(self)}
        for _, attention in self._layers():
            if id(attention) in sources:
                continue
            cache = session.cache_of(attention)
            past, cached = (EMPTY, EMPTY) if cache is None else (cache.row_lengths, cache.row_cached_lengths)
            longest = max(past + adds)
            most = self.max_positions
            if most is not None and longest > most:
                raise ArgumentError(
                    too_long(
                        f"the model has positions for {most} tokens", most - longest, longest + unread, new, max(past)
                    )
                )
            if session.cache is not None:
                check_cache_room(attention, cached, prompts, adds, new, unread)

    @property
    @abstractmethod
    def max_positions(self) -> int | None:
        """Most tokens of a row, by the positions; None: no limit."""

    def _holders(self) -> dict[str, CacheHolder]:
        """Every module that may have a cache, by its path in this model."""
        attentions = {id(attention) for _, attention in self._layers()}
        return (
            {path: holder for path, holder in holders(self).items() if id(holder) in attentions} if attentions else {}
        )

    def _conversation(self) -> KVCache:
        return KVCache.from_model(self)

    def _layers(self) -> Iterator[tuple[int, Attention]]:
        for layer, block in enumerate(self.decoder_blocks()):
            for module in block.modules():
                if isinstance(module, Attention):
                    yield layer, module

    def _follow_mode(self) -> None:
        for layer, attention in self._layers():
            attention.use_kv_cache = not self.training and layer in self._cached_layers
