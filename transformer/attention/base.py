"""The one forward of every attention module: project, rotate, append, attend, project out."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cache import (
    CacheCall,
    CacheHolder,
    CacheSlot,
    Chunk,
    Contents,
    LayerCache,
    Rows,
    Step,
    active_call,
    plan_step,
    run_eagerly,
    sliding_window,
    traced_step,
)
from ..errors import ArgumentError, CacheStateError
from ..masks import Rule
from ..positions import Rotation, ScoreBias
from ..signatures import typed_as
from ..tracing import is_traced
from . import checks
from .cross_attention import cross_attention
from .heads import ProjectedHeads
from .kernels import Kernel
from .self_attention import self_attention
from .signatures import attention_call
from .static_step import static_cross_step, static_step
from .traced import traced_attention

if TYPE_CHECKING:
    from typing_extensions import Self


class Attention(ProjectedHeads, CacheHolder):
    """Attention with `num_heads` query heads over `num_groups` key/value heads, and a cache of its own.

    The base of `MultiHeadAttention`, `MultiQueryAttention` and `GroupQueryAttention`, which say only how many key/value
    heads there are. Shapes: `B` rows, `L` new tokens, `S` keys, `E` embed_dim, `H` heads, `G` key/value heads, `D`
    head_dim, `W` window.

    Args:
        embed_dim: `E`, the width of `x` and of the output.
        num_heads: `H`.
        num_groups: `G`, a divisor of `H`.
        apply_causal_mask: whether a query sees no key after it.
        use_kv_cache: whether calls without `kv` append to `kv_cache`, and calls with `kv` keep their projected source.
        head_dim: `D`, by default `E // H`.
        kv_dim: width of an external `kv`, by default `E`.
        bias, out_bias: whether the input projections, and the output projection, add a bias.
        dropout: share of attention weights dropped while training.
        position: a `Rotation` or `ScoreBias` of `transformer.positions`.
        window_size: `W` of the sliding mode, counting the query itself. Given, the module slides unless a call says no.
        num_sinks: first tokens that stay visible beside the window (StreamingLLM, arXiv 2309.17453).
        qk_norm: a norm over `D`, a module (copied for the keys) or a callable that makes one of `D`; before rotation.
        scale: factor of the scores, by default `D ** -0.5`.
        softcap: scores become `softcap * tanh(score / softcap)` before any bias (Gemma 2, arXiv 2408.00118).
        max_cache_length: most tokens that the cache may hold; it is then allocated once.

    Raises:
        ConfigurationError: for options that cannot work, naming the option.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_groups: int,
        apply_causal_mask: bool = False,
        use_kv_cache: bool = False,
        *,
        head_dim: int | None = None,
        kv_dim: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        dropout: float = 0.0,
        position: Rotation | ScoreBias | None = None,
        window_size: int | None = None,
        num_sinks: int = 0,
        qk_norm: nn.Module | Callable[[int], nn.Module] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        max_cache_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.check_heads(embed_dim, num_heads, num_groups, head_dim)
        checks.check_memory(window_size, num_sinks, max_cache_length)
        checks.check_numbers(dropout, scale, softcap)
        checks.check_at_least("kv_dim", kv_dim, 1)
        head_dim = embed_dim // num_heads if head_dim is None else head_dim
        checks.check_position(position, num_heads, head_dim)
        out_bias = bias if out_bias is None else out_bias
        super().__init__(
            embed_dim, num_heads, num_groups, head_dim, kv_dim or embed_dim, bias, out_bias, qk_norm, device, dtype
        )
        self.apply_causal_mask = apply_causal_mask
        self.use_kv_cache = use_kv_cache
        self.dropout = dropout
        self.window_size = window_size
        self.num_sinks = num_sinks
        self.max_cache_length = max_cache_length
        self.kernel = Kernel(head_dim**-0.5 if scale is None else scale, softcap)
        self.position = position
        self.slot = CacheSlot()

    @typed_as(attention_call)
    def forward(
        self,
        x: Tensor,
        kv: Tensor | None = None,
        expanding_context: bool | None = None,
        *,
        attention_mask: Tensor | None = None,
        kv_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        return_weights: bool = False,
        step: Step | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of `x` over itself and what the cache holds, or over `kv`.

        Args:
            x: `[B, L, E]`.
            kv: `[B, S, kv_dim]`, an external source: cross-attention.
            expanding_context: True: all that was fed stays visible. False: a window slides. None: sliding where the
                module has a `window_size`.
            attention_mask: `[B, L]`, true for a real token; padding takes no position and its output is exactly 0.
            kv_mask: `[B, S]`, the same for `kv`.
            attn_bias: float (added to the scores) or bool (true: seen), broadcasts to `[B, H, L, S]`. Columns are the
                tokens held before the call, then this call's as given.
            return_weights: whether to return the weights too, before dropout.
            step: this call's facts, from `plan` of a layer alike; then no mask and no mode are given.

        Returns:
            `[B, L, E]`, or `(out, weights [B, H, L, S])`.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: for input that does not fit, naming the argument.
            CacheFullError, CacheStateError, ConcurrentUseError: the cache is then as it was.
        """
        checks.check_tensor("x", x, self.embed_dim, checks.weight_of(self.q_proj))
        checks.check_mode(expanding_context)
        arguments = x, kv, expanding_context, attention_mask, kv_mask, attn_bias, return_weights, step
        if torch.compiler.is_compiling() and self.compiles:
            return self._compiled(*arguments)
        call = active_call()
        if call is None and not self.use_kv_cache:
            return self._attend(None, *arguments)
        if torch.compiler.is_dynamo_compiling():
            return run_eagerly(self._attend_cached, call, *arguments)
        return self._attend_cached(call, *arguments)

    def plan(self, x: Tensor, expanding_context: bool | None = None, attention_mask: Tensor | None = None) -> Step:
        """The facts of a self-attention call with `x` [B, L, E], to be shared by all layers alike as `step=`.

        Raises ShapeError, DtypeError or DeviceError as the call itself would.
        """
        checks.check_tensor("x", x, self.embed_dim, None)
        checks.check_mode(expanding_context)
        call = active_call()
        real = checks.real_tokens("attention_mask", attention_mask, x.shape[0], x.shape[1], x.device)
        if is_traced(x) and not self.keeps(call):
            return traced_step(x, real, self.traced_rule(expanding_context), expanding_context)
        contents, chunk = self.contents(call), Chunk.of(x, real)
        return plan_step(contents, chunk, self.rule(contents, chunk.gained, expanding_context), expanding_context)

    def keeps(self, call: CacheCall | None) -> bool:
        """Whether this module keeps keys and values, in a call (None: on its own)."""
        return self.use_kv_cache if call is None else call.slot(self) is not None

    def contents(self, call: CacheCall | None) -> Contents | None:
        """What the cache of this module holds, in a call (None: on its own); None where there is nothing."""
        if call is not None:
            return call.contents(self)
        cache = self.slot.cache if self.use_kv_cache else None
        return None if cache is None else cache.contents

    def rule(self, contents: Contents | None, gained: Rows, expanding_context: bool | None = None) -> Rule:
        """Whom a query sees in a call whose rows gain so many tokens, after what the cache holds."""
        sliding = self.window_size is not None if expanding_context is None else not expanding_context
        window = sliding_window(contents, gained, self.window_size) if sliding else None
        return Rule(self.apply_causal_mask, window, self.num_sinks)

    def traced_rule(self, expanding_context: bool | None = None) -> Rule:
        """The same in a traced call without a cache: a window as long as the chunk itself hides nothing."""
        sliding = self.window_size is not None if expanding_context is None else not expanding_context
        return Rule(self.apply_causal_mask, self.window_size if sliding else None, self.num_sinks)

    @property
    def compiles(self) -> bool:
        """Whether this is a step that is being compiled, over a cache that `freeze_layout` has laid out for it."""
        cache = self.slot.cache if self.use_kv_cache else None
        return cache is not None and (cache.static is not None or cache.static_source is not None)

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
            checks.check_cache(cache, self.num_groups, self.head_dim, self.num_sinks)
        self.slot.cache = cache

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        # `.to()`, `.half()` and their kin: a live cache goes along with the weights.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.slot.cache is not None:
            self.slot.cache.apply(fn)
        return self

    def new_cache(self) -> LayerCache:
        """An empty cache of the shape that this module begins a conversation with."""
        return LayerCache(
            self.num_groups,
            self.head_dim,
            num_sinks=self.num_sinks,
            window_size=self.window_size,
            max_length=self.max_cache_length,
            position=repr(self.position),
        )

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of the keys' weights."""
        floats = (weight.dtype for weight in self.k_proj.parameters() if weight.is_floating_point())
        return next(floats, torch.get_default_dtype())

    def _compiled(
        self,
        x: Tensor,
        kv: Tensor | None,
        expanding_context: bool | None,
        attention_mask: Tensor | None,
        kv_mask: Tensor | None,
        attn_bias: Tensor | None,
        return_weights: bool,
        step: Step | None,
    ) -> Tensor:
        cache = self.slot.cache
        static = None if cache is None else cache.static
        source = None if cache is None else cache.static_source
        if attention_mask is not None or attn_bias is not None or return_weights or self.training:
            raise ArgumentError(
                "compiled steps over a frozen layout take x, kv, kv_mask, expanding_context and step, in eval(); "
                "for other masks, biases and weights call the module as it is"
            )
        if kv is not None and source is not None:
            checks.check_source(kv, x, self.kv_dim, checks.weight_of(self.k_proj), self.apply_causal_mask)
            kv_real = checks.real_tokens("kv_mask", kv_mask, kv.shape[0], kv.shape[1], kv.device)
            return static_cross_step(self, self.kernel, source, x, kv, kv_real)
        step = self.plan(x, expanding_context) if step is None else step
        if kv is not None or static is None or step.at is None or self.max_cache_length is None:
            raise ArgumentError(
                "compiled steps go on with what the cache held when frozen: expected kv where it had a "
                "source, else tokens, and a step planned in the same call; freeze_layout() after the first eager call"
            )
        return static_step(self, self.kernel, self.position, static, x, step.at, step.rule, self.max_cache_length)

    def _attend_cached(self, call: CacheCall | None, *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        if call is not None:
            return self._attend(call, *arguments)
        call = CacheCall()
        try:
            result = self._attend(call, *arguments)
            call.publish()
            return result
        finally:
            call.done = True

    def _attend(
        self,
        call: CacheCall | None,
        x: Tensor,
        kv: Tensor | None,
        expanding_context: bool | None,
        attention_mask: Tensor | None,
        kv_mask: Tensor | None,
        attn_bias: Tensor | None,
        return_weights: bool,
        step: Step | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        written = None if call is None else call.begin(self)
        # Tensors on the meta device have shapes, by which a cache can count.
        traced = is_traced(x) and (written is None or not x.is_meta)
        if traced and written is not None:
            raise CacheStateError(
                "use_kv_cache: expected False in a traced call (torch.export, torch.func, fake tensors), which cannot "
                "count tokens; turn the cache off, or freeze_layout() to compile or export a step"
            )
        given = attn_bias, self.dropout if self.training else 0.0, return_weights
        if kv is not None:
            if step is not None:
                raise ArgumentError("step: expected None with kv; cross-attention has no positions")
            real = checks.real_tokens("attention_mask", attention_mask, x.shape[0], x.shape[1], x.device)
            checks.check_source(kv, x, self.kv_dim, checks.weight_of(self.k_proj), self.apply_causal_mask)
            kv_real = checks.real_tokens("kv_mask", kv_mask, kv.shape[0], kv.shape[1], kv.device)
            out, weights, contents = cross_attention(self, self.kernel, call, written, x, real, kv, kv_real, *given)
        else:
            checks.check_no_source(kv_mask, self.kv_dim, self.embed_dim)
            if call is not None and written is None and self.apply_causal_mask:
                call.check_forgets_nothing(self)
            if step is not None and (expanding_context is not None or attention_mask is not None):
                raise ArgumentError(
                    "step: expected no expanding_context and no attention_mask beside it; it carries both"
                )
            if traced:
                step = self._traced_step(x, expanding_context, attention_mask, step)
                out, weights = traced_attention(self, self.kernel, self.position, x, step, *given)
                return out if weights is None else (out, weights)
            before = None if written is None else written.contents
            if step is None:
                chunk = checks.chunk_of(x, attention_mask)
                step = plan_step(before, chunk, self.rule(before, chunk.gained, expanding_context), expanding_context)
            else:
                rule = self.rule(before, step.gained, step.expanding_context)
                checks.check_step(step, x, rule, written is not None)
            out, weights, contents = self_attention(self, self.kernel, self.position, written, x, step, *given)
        if call is not None and written is not None and contents is not None:
            call.write(written, contents)
        return out if weights is None else (out, weights)

    def _traced_step(
        self, x: Tensor, expanding_context: bool | None, attention_mask: Tensor | None, step: Step | None
    ) -> Step:
        if step is None:
            real = checks.real_tokens("attention_mask", attention_mask, x.shape[0], x.shape[1], x.device)
            return traced_step(x, real, self.traced_rule(expanding_context), expanding_context)
        if step.traced:
            checks.check_step(step, x, self.traced_rule(step.expanding_context), False)
            return step
        # Planned outside of what is traced: its numbers would make one graph for each length.
        return traced_step(x, step.real, self.traced_rule(step.expanding_context), step.expanding_context)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...
