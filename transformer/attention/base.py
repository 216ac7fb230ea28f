"""Forward of every attention module: checks once, attends in one of three ways, commits once."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cache import AnyPolicy, CacheCall, CacheSlot, Step, TokenLayout, active_call
from ..codecs import CacheDtypes
from ..errors import require_count
from ..kernels import Kernel
from ..positions import Rotation, ScoreBias
from ..signatures import typed_as
from ..tracing import is_traced, run_eagerly
from . import checks, option_checks
from .call import Arguments
from .checked_call import checked_call, new_step
from .cross_attention import cross_attention
from .heads import CachedHeads
from .rules import MaskRule, ScoreRule
from .self_attention import self_attention
from .signatures import attention_call
from .static_step import compiled_call
from .traced import traced_attention, traced_step


class Attention(CachedHeads):
    """Attention with `num_heads` query heads over `num_groups` key/value heads, and a cache of its own.

    The base of `MultiHeadAttention`, `MultiQueryAttention` and `GroupQueryAttention`, which set only `num_groups`.
    Shapes: `B` rows, `L` new tokens, `S` keys, `E` embed_dim, `H` heads, `G` key/value heads, `D` head_dim, `W` window.

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
        qk_norm_per_head: False: `qk_norm` is over all heads together, `H * D` and `G * D` (OLMo 2, arXiv 2501.00656).
        scale: factor of the scores, above 0, by default `D ** -0.5`.
        softcap: scores become `softcap * tanh(score / softcap)` before any bias (Gemma 2, arXiv 2408.00118).
        sink_logits: whether each head learns a logit that joins the denominator of its softmax alone (GPT-OSS).
        max_cache_length: most tokens that the cache may hold; it is then allocated once.
        cache_dtype: how keys and values are stored, and then read: "float16", "bfloat16", "float8_e4m3fn", "int8",
            "int4", a dtype, or a pair of these; no gradients are recorded then. None: as the weights.
        cache_budget: `(tokens, policy)`: after each call at most `tokens` of a row are cached, those that the policy of
            `transformer.cache.policies` scores highest for each key/value head; more than `num_sinks` and those that
            the policy always keeps.
        mask_rule: `mask_rule(q_position, k_position) -> bool tensor`, true: visible. A function or a module of the
            positions of queries and keys, int64 [1 or B, 1, L, 1] and [1 or B, 1 or H, 1, S], counted over the real
            tokens of a row or packed document, whatever `positions=` says; the result broadcasts to [B, H, L, S]. A key
            is visible where the rule, causal order (if there is one) and window or sinks all allow it. With the same
            positions it gives the same result: layers with one rule ask it once for all of them.
        score_rule: `score_rule(scores, q_position, k_position) -> scores`, a change of the scores [B, H, L, S] after
            `scale` and `softcap`, before biases and mask, in at least float32. A function or a module, whose
            parameters learn. What it gives for a hidden key does not count. Positions are true ones, as in `mask_rule`:
            a sink, too, has the position at which it was read. Both rules are those of flex_attention (arXiv
            2412.05496), with a cache; neither is for calls with `kv`.

    Raises ConfigurationError for options that cannot work, naming the option.
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
        qk_norm_per_head: bool = True,
        scale: float | None = None,
        softcap: float | None = None,
        sink_logits: bool = False,
        max_cache_length: int | None = None,
        cache_dtype: CacheDtypes = None,
        cache_budget: tuple[int, AnyPolicy] | None = None,
        mask_rule: MaskRule | None = None,
        score_rule: ScoreRule | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        option_checks.check_heads(embed_dim, num_heads, num_groups, head_dim)
        option_checks.check_flags(apply_causal_mask=apply_causal_mask, use_kv_cache=use_kv_cache, bias=bias)
        option_checks.check_memory(window_size, num_sinks, max_cache_length)
        option_checks.check_cache_dtype(cache_dtype)
        option_checks.check_numbers(dropout, scale, softcap)
        option_checks.check_rules(mask_rule=mask_rule, score_rule=score_rule)
        if kv_dim is not None:
            require_count("kv_dim", kv_dim)
        head_dim = embed_dim // num_heads if head_dim is None else head_dim
        option_checks.check_position(position, num_heads, head_dim)
        out_bias = bias if out_bias is None else out_bias
        option_checks.check_flags(out_bias=out_bias, qk_norm_per_head=qk_norm_per_head)
        super().__init__(
            embed_dim,
            num_heads,
            num_groups,
            head_dim=head_dim,
            kv_dim=kv_dim or embed_dim,
            bias=bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
            qk_norm_per_head=qk_norm_per_head,
            device=device,
            dtype=dtype,
        )
        self.add_sink_logits(sink_logits, device, dtype)
        self.apply_causal_mask, self.use_kv_cache = apply_causal_mask, use_kv_cache
        self.dropout = dropout
        self.window_size, self.num_sinks = window_size, num_sinks
        self.max_cache_length, self.cache_dtype = max_cache_length, cache_dtype
        self.cache_budget = cache_budget
        scale = head_dim**-0.5 if scale is None else float(scale)
        self.kernel = Kernel(scale, None if softcap is None else float(softcap))
        self.position = position
        self.mask_rule, self.score_rule = mask_rule, score_rule
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
        positions: Tensor | None = None,
        step: Step | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of `x` over itself and the cached tokens, or over `kv`.

        Args:
            x: `[B, L, E]`.
            kv: `[B, S, kv_dim]`, an external source: cross-attention.
            expanding_context: True: all tokens read so far stay visible. False: a window slides. None: sliding if the
                module has a `window_size`.
            attention_mask: `[B, L]`, true for a real token; padding takes no position and its output is exactly 0.
            kv_mask: `[B, S]`, the same for `kv`.
            attn_bias: float (added to the scores) or bool (true: visible), broadcasts to `[B, H, L, S]`. Columns are
                the cached tokens before the call (after `compress` those of each head), then this call's as given. -inf
                alone hides a key: finite numbers count as they are, added in at least float32. +inf and NaN are refused
                in eager calls on the CPU.
            return_weights: whether to return the weights too: the softmax of the scores, before dropout. They are
                exactly 0 for a key that the query may not see, and in the whole row of a query that sees no key.
            positions: int [B, L], positions for the module's scheme in place of counted ones; order, window and what a
                query sees stay those of the places in the row.
            step: this call's facts, from `plan` of a layer alike; then no mask and no mode are given.

        Returns:
            `[B, L, E]`, or `(out, weights [B, H, L, S])`.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: for input that does not fit, naming the argument.
            CacheFullError, CacheStateError, ConcurrentUseError: the cache is then as it was.
        """
        projection = self.q_proj
        weight = projection._parameters.get("weight") if type(projection) is nn.Linear else None
        fits = (
            type(x) is Tensor
            and x.ndim == 3
            and x.shape[2] == self.embed_dim
            and weight is not None
            and x.dtype is weight.dtype
            and x.device == weight.device
        )
        if not fits:
            # Wrong, or a weight whose dtype and device say nothing: packed, wrapped or offloaded.
            checks.check_tensor("x", x, self.embed_dim, checks.weight_of(projection))
        if expanding_context is not None:
            checks.check_mode(expanding_context)
        given = Arguments(kv, expanding_context, attention_mask, kv_mask, attn_bias, return_weights, step)
        if positions is not None:
            given = given._replace(layout=TokenLayout(position_ids=positions))
        if torch.compiler.is_compiling() and self.compiles:
            planned = step if step is not None or kv is not None else self.plan(x, expanding_context)
            return compiled_call(self, x, given, planned)
        call = active_call()
        if torch.compiler.is_dynamo_compiling() and (call is not None or self.use_kv_cache):
            return run_eagerly(self._attend, call, x, given)
        return self._attend(call, x, given)

    def plan(
        self,
        x: Tensor,
        expanding_context: bool | None = None,
        attention_mask: Tensor | None = None,
        layout: TokenLayout | None = None,
    ) -> Step:
        """The facts of a self-attention call with `x` [B, L, E], to be shared by all layers alike as `step=`.

        A `layout` says more of the tokens than a mask: packed documents, prefixes, positions. Raises ShapeError,
        DtypeError or DeviceError as the call itself would.
        """
        checks.check_tensor("x", x, self.embed_dim, None)
        checks.check_mode(expanding_context)
        call = active_call()
        if is_traced(x) and not self.keeps(call):
            return traced_step(self, x, expanding_context, attention_mask, layout)
        return new_step(self, x, self.contents(call), expanding_context, attention_mask, layout)

    def _attend(self, outer: CacheCall | None, x: Tensor, given: Arguments) -> Tensor | tuple[Tensor, Tensor]:
        """The result of a call, as a part of the call `outer` or, if that is None, as the whole call."""
        own = CacheCall() if outer is None and self.use_kv_cache else None
        caches = outer if own is None else own
        try:
            call = checked_call(self, caches, x, given)
            if call.kv is not None:
                attended = cross_attention(call)
            elif call.step is not None and call.step.traced:
                attended = traced_attention(call)
            else:
                attended = self_attention(call)
            contents, layer, budget = attended.contents, call.layer, self.budget
            if contents is not None and layer is not None:
                if budget is not None and contents.state is not layer.contents.state:
                    contents = contents.compressed(*budget, layer.cache.spec)
                layer.contents = contents
            if own is not None:
                own.publish()
        finally:
            if own is not None:
                own.done = True
        return attended.out if attended.weights is None else (attended.out, attended.weights)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...
