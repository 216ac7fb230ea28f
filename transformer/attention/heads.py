"""Heads of one attention module: the four projections, their norms, the cache, and the rule of visibility."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..cache import (
    AnyPolicy,
    CacheBudget,
    CacheCall,
    CacheContents,
    CacheHolder,
    CacheSpec,
    LayerCache,
    Lengths,
    active_call,
    compiled_layout,
    inside_a_call,
)
from ..codecs import CacheDtypes, codec_names
from ..initialization import reset_children
from ..kernels import Kernel, project, project_together
from ..masks import Rule
from ..positions import Rotation, ScoreBias
from . import checks
from .projected_heads import as_heads, new_norms
from .rules import HasRules
from .sink_logits import HasSinkLogits


class CachedHeads(HasRules, HasSinkLogits, CacheHolder):
    """Projections into heads and out of them, with a cache of the keys and values in `slot`.

    The projections have their usual names: `q_proj`, `k_proj`, `v_proj`, `out_proj`. `q_norm` and `k_norm` are norms
    over `D`, or over `H * D` and `G * D` unless `qk_norm_per_head`, or None; the keys' one is a copy of the queries'.
    """

    apply_causal_mask: bool
    use_kv_cache: bool
    window_size: int | None
    num_sinks: int
    max_cache_length: int | None
    dropout: float
    position: Rotation | ScoreBias | None
    kernel: Kernel
    # Also of modules that were pickled before there was a choice.
    cache_dtype: CacheDtypes = None
    qk_norm_per_head: bool = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_groups: int,
        *,
        head_dim: int,
        kv_dim: int,
        bias: bool,
        out_bias: bool,
        qk_norm: nn.Module | Callable[[int], nn.Module] | None,
        qk_norm_per_head: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_groups = num_groups
        self.head_dim = head_dim
        self.kv_dim = kv_dim
        linear = partial(nn.Linear, device=device, dtype=dtype)
        self.q_proj = linear(embed_dim, num_heads * head_dim, bias)
        self.k_proj = linear(kv_dim, num_groups * head_dim, bias)
        self.v_proj = linear(kv_dim, num_groups * head_dim, bias)
        self.out_proj = linear(num_heads * head_dim, embed_dim, out_bias)
        self.qk_norm_per_head = qk_norm_per_head
        normed = (1, 1) if qk_norm_per_head else (num_heads, num_groups)
        self.q_norm, self.k_norm = new_norms(qk_norm, *(number * head_dim for number in normed))
        if device is not None or dtype is not None:
            for norm in (self.q_norm, self.k_norm):
                if norm is not None:
                    norm.to(device=device, dtype=dtype)

    @property
    def num_kv_heads(self) -> int:
        """`G`, the number of key/value heads: another name of `num_groups`."""
        return self.num_groups

    def query(self, x: Tensor) -> Tensor:
        """`x` [B, L, E] to queries [B, H, L, D]."""
        query = project(self.q_proj, x)
        return as_heads("q_proj", query, self.num_heads, self.head_dim, self.q_norm, self.qk_norm_per_head)

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [B, L, kv_dim] to keys and values [B, G, L, D]."""
        key, value = project_together((self.k_proj, self.v_proj), x)
        key = as_heads("k_proj", key, self.num_groups, self.head_dim, self.k_norm, self.qk_norm_per_head)
        return key, as_heads("v_proj", value, self.num_groups, self.head_dim, None)

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x` [B, L, E] to queries [B, H, L, D], and keys and values [B, G, L, D]."""
        # Read where they are registered, a fifth of the cost of asking the module; what stands in for one may not be.
        parts = self._modules
        q_proj, k_proj, v_proj = parts.get("q_proj"), parts.get("k_proj"), parts.get("v_proj")
        if q_proj is None or k_proj is None or v_proj is None:
            q_proj, k_proj, v_proj = self.q_proj, self.k_proj, self.v_proj
        query, key, value = project_together((q_proj, k_proj, v_proj), x)
        query = as_heads("q_proj", query, self.num_heads, self.head_dim, self.q_norm, self.qk_norm_per_head)
        key = as_heads("k_proj", key, self.num_groups, self.head_dim, self.k_norm, self.qk_norm_per_head)
        return query, key, as_heads("v_proj", value, self.num_groups, self.head_dim, None)

    def out(self, heads: Tensor) -> Tensor:
        """Heads [B, H, L, D] to [B, L, E]."""
        batch, number, length, head_dim = heads.shape
        # As in `as_heads`.
        if torch.compiler.is_dynamo_compiling() or type(length) is not int or length != 1:
            heads = heads.transpose(1, 2)
        projection = self._modules.get("out_proj")
        if projection is None:
            projection = self.out_proj
        return project(projection, heads.reshape(batch, length, number * head_dim))

    def reset_parameters(self) -> None:
        """Initialises the projections, the norms, and a position scheme that learns, anew; a cache stays."""
        reset_children(self)
        self.reset_sink_logits()

    def extra_repr(self) -> str:
        """Options as `print` shows them; position schemes and norms follow, as modules."""
        shown = {
            "embed_dim": self.embed_dim,
            "kv_dim": None if self.kv_dim == self.embed_dim else self.kv_dim,
            "num_heads": self.num_heads,
            "num_groups": self.num_groups,
            "head_dim": self.head_dim,
            "apply_causal_mask": self.apply_causal_mask,
            "window_size": self.window_size,
            "num_sinks": self.num_sinks or None,
            "softcap": self.kernel.softcap,
            "sink_logits": None if self.sink_logits is None else True,
            "dropout": self.dropout or None,
            "use_kv_cache": self.use_kv_cache,
            "max_cache_length": self.max_cache_length,
            "cache_dtype": self.cache_dtype,
            "cache_budget": self.cache_budget,
            # One that is a module follows as such.
            "mask_rule": None if "mask_rule" in self._modules else self.mask_rule,
            "score_rule": None if "score_rule" in self._modules else self.score_rule,
            "kv_cache": self.slot.cache,
        }
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if value is not None)

    def rule(self, contents: CacheContents | None, new_lengths: Lengths, expanding_context: bool | None = None) -> Rule:
        """The rule of visibility of a call with `new_lengths` tokens per row, after the contents of the cache.

        A sliding call without a `window_size` has the window that the cache fixed before, else as many tokens as the
        cache holds, else the real length of this chunk.
        """
        sliding = self.window_size is not None if expanding_context is None else not expanding_context
        window = self.window_size if sliding else None
        if sliding and window is None:
            if contents is not None and contents.state is not None:
                layout = compiled_layout(contents.state)
                window = contents.state.window or (0 if layout is not None else max(contents.row_cached_lengths))
            # A chunk without a real token fixes nothing; its window is not used.
            window = window or max(*new_lengths, 1)
        return Rule(self.apply_causal_mask, window, self.num_sinks)

    def traced_rule(self, expanding_context: bool | None = None) -> Rule:
        """The same in a traced call without a cache: a window as long as the chunk itself hides nothing."""
        sliding = self.window_size is not None if expanding_context is None else not expanding_context
        return Rule(self.apply_causal_mask, self.window_size if sliding else None, self.num_sinks)

    @property
    def kv_cache(self) -> LayerCache | None:
        """The cached tokens of this module: None before the first cached call. Set None to clear.

        Within a generation, such as in a forward hook, it is that generation's.
        """
        call = active_call()
        return self.slot.cache if call is None else call.cache(self)

    @kv_cache.setter
    def kv_cache(self, cache: LayerCache | None) -> None:
        if cache is not None:
            checks.check_cache(cache, self.cache_spec)
        self.slot.cache = cache

    @property
    def cache_budget(self) -> CacheBudget | None:
        """`(tokens, policy)`: the most tokens of a row after each call, and what says which; None: all stay.

        It may be set at any time, for the calls from then on. Setting it raises ConfigurationError as the constructor.
        """
        return self.budget

    @cache_budget.setter
    def cache_budget(self, budget: tuple[int, AnyPolicy] | None) -> None:
        self.budget = CacheBudget.of(budget, self.num_sinks)

    def keeps(self, call: CacheCall | None) -> bool:
        """True if this module keeps keys and values, in a call (None: on its own)."""
        return self.use_kv_cache if call is None else call.slot(self) is not None

    def contents(self, call: CacheCall | None) -> CacheContents | None:
        """The contents of this module's cache, in a call (None: on its own); None where there is nothing."""
        if call is not None:
            return call.contents(self)
        cache = self.slot.cache if self.use_kv_cache else None
        return None if cache is None else cache.contents

    @property
    def compiles(self) -> bool:
        """True in a step that is being compiled, over a cache that `freeze_layout` laid out; with a budget: eager."""
        cache = self.slot.cache if self.use_kv_cache and self.budget is None else None
        if cache is None or (cache.static is None and cache.static_source is None):
            return False
        # A call that is under way says where its tokens go: a generation has slots of its own.
        return not inside_a_call()

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
            cache_dtype=codec_names(self.cache_dtype),
        )

    @property
    def kv_dtype(self) -> torch.dtype:
        """The dtype of the keys' weights; float32 where these are packed."""
        floats = (weight.dtype for weight in self.k_proj.parameters() if weight.is_floating_point())
        return next(floats, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to()`, `.half()` and their kin: a live cache goes along with the weights.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.slot.cache is not None:
            self.slot.cache.apply(fn)
        return self
