"""The one forward of every attention module: project, rotate, append, attend, project out."""

import copy
from abc import ABC
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from ..cache import EMPTY, Guard, LayerCache, Source, Step, plan_step, versions, whole_chunk
from ..errors import ArgumentError
from ..masks import Rule
from ..positions import Rotation, ScoreBias
from . import checks
from .attend import Attend
from .columns import Columns
from .cross import attend_source
from .kernels import Kernel, as_bias
from .projection import project


class Attention(nn.Module, ABC):
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
        super().__init__()
        checks.check_heads(embed_dim, num_heads, num_groups, head_dim)
        checks.check_memory(window_size, num_sinks, max_cache_length)
        checks.check_numbers(dropout, scale, softcap)
        checks.check_at_least("kv_dim", kv_dim, 1)
        head_dim = embed_dim // num_heads if head_dim is None else head_dim
        checks.check_position(position, num_heads, head_dim)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_groups = num_groups
        self.head_dim = head_dim
        self.kv_dim = embed_dim if kv_dim is None else kv_dim
        self.apply_causal_mask = apply_causal_mask
        self.use_kv_cache = use_kv_cache
        self.dropout = dropout
        self.window_size = window_size
        self.num_sinks = num_sinks
        self.max_cache_length = max_cache_length
        self.kernel = Kernel(head_dim**-0.5 if scale is None else scale, softcap)
        linear = partial(nn.Linear, device=device, dtype=dtype)
        self.q_proj = linear(embed_dim, num_heads * head_dim, bias)
        self.k_proj = linear(self.kv_dim, num_groups * head_dim, bias)
        self.v_proj = linear(self.kv_dim, num_groups * head_dim, bias)
        self.out_proj = linear(num_heads * head_dim, embed_dim, bias if out_bias is None else out_bias)
        self.q_norm = qk_norm if qk_norm is None or isinstance(qk_norm, nn.Module) else qk_norm(head_dim)
        if self.q_norm is not None:
            self.q_norm = self.q_norm.to(device=device, dtype=dtype)
        self.k_norm = copy.deepcopy(self.q_norm)
        self.position = position
        self._cache: LayerCache | None = None
        self._guard = Guard()

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
        with self._guard if self.use_kv_cache else nullcontext():
            if kv is not None:
                if step is not None:
                    raise ArgumentError("step: expected None with kv; cross-attention has no positions")
                real = checks.real_tokens("attention_mask", attention_mask, x.shape[0], x.shape[1], x.device)
                out, weights = self._cross_attention(x, kv, real, kv_mask, attn_bias, return_weights)
            else:
                checks.check_no_source(kv_mask, self.kv_dim, self.embed_dim)
                if step is None:
                    step = self.plan(x, expanding_context, attention_mask)
                else:
                    given_too = expanding_context is not None or attention_mask is not None
                    rule = Rule(self.apply_causal_mask, self.window_size, self.num_sinks)
                    checks.check_step(step, x, given_too, rule, self.use_kv_cache)
                out, weights = self._self_attention(x, step, attn_bias, return_weights)
        return out if weights is None else (out, weights)

    def plan(self, x: Tensor, expanding_context: bool | None = None, attention_mask: Tensor | None = None) -> Step:
        """The facts of a self-attention call with `x` [B, L, E], to be shared by all layers alike as `step=`."""
        return plan_step(
            self._cache if self.use_kv_cache else None,
            x,
            checks.real_tokens("attention_mask", attention_mask, x.shape[0], x.shape[1], x.device),
            causal=self.apply_causal_mask,
            sliding=self.window_size is not None if expanding_context is None else not expanding_context,
            window_size=self.window_size,
            num_sinks=self.num_sinks,
        )

    # --- the cache ------------------------------------------------------------------------------------------------

    @property
    def kv_cache(self) -> LayerCache | None:
        """What this module has seen and still holds: None before the first cached call. Set None to forget."""
        return self._cache

    @kv_cache.setter
    def kv_cache(self, cache: LayerCache | None) -> None:
        if cache is not None:
            checks.check_cache(cache, self.num_groups, self.head_dim, self.num_sinks)
        self._cache = cache

    def _new_cache(self) -> LayerCache:
        return LayerCache(
            self.num_groups,
            self.head_dim,
            num_sinks=self.num_sinks,
            window_size=self.window_size,
            max_length=self.max_cache_length,
        )

    def _self_attention(
        self, x: Tensor, step: Step, attn_bias: Tensor | None, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """project -> rotate -> append -> attend -> project out; the cache changes last."""
        cache = (self._cache or self._new_cache()) if self.use_kv_cache else None
        held = EMPTY if cache is None else cache.row_helds
        shape = (step.batch, self.num_heads, step.tokens, max(held) + step.tokens)
        if attn_bias is not None:
            checks.check_attn_bias(attn_bias, shape, x.device)
        if step.width == 0:
            # No real token: nothing happens, and the output of padding is 0.
            return torch.zeros_like(x), x.new_zeros(shape) if return_weights else None
        packed = step.pack(x)
        query, key, value = self._query(packed), self._key(packed), self._value(packed)
        far = query
        position = self.position
        rotation = position if isinstance(position, Rotation) else None
        if rotation is not None:
            table = step.once(("angles", rotation), partial(rotation.table, step.query_positions, key))
            query, key = rotation.rotate(query, table), rotation.rotate(key, table)
        pending = None if cache is None else cache.append(key, value, step)
        context = whole_chunk(key, value, step) if pending is None else pending.context
        near = query
        if rotation is not None and context.sink_key is not None and step.rule.window is not None:
            table = step.once(("near", rotation), partial(rotation.table, step.near_positions, key))
            near = rotation.rotate(far, table)
        columns = Columns(step, context, held) if attn_bias is not None or return_weights else None
        given = columns.to_kernel(as_bias(attn_bias)) if columns is not None and attn_bias is not None else None
        score_bias = position if isinstance(position, ScoreBias) else None
        attend = Attend(self.kernel, step, context, query, near, score_bias, given, self._dropping)
        heads, weights = attend(return_weights)
        out = step.unpack(self._projected_out(heads))
        if weights is not None and columns is not None:
            weights = columns.from_kernel(weights)
        if cache is not None and pending is not None:
            cache.commit(pending)
            if self._cache is None:
                self._cache = cache
        return out, weights

    def _cross_attention(
        self,
        x: Tensor,
        kv: Tensor,
        real: Tensor | None,
        kv_mask: Tensor | None,
        attn_bias: Tensor | None,
        return_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """project -> look up or project the source -> attend -> project out; the cache changes last."""
        checks.check_source(kv, x, self.kv_dim, checks.weight_of(self.k_proj), self.apply_causal_mask)
        kv_real = checks.real_tokens("kv_mask", kv_mask, kv.shape[0], kv.shape[1], kv.device)
        if attn_bias is not None:
            checks.check_attn_bias(attn_bias, (x.shape[0], self.num_heads, x.shape[1], kv.shape[1]), x.device)
        keeps = self.use_kv_cache and not torch.is_grad_enabled()
        cache = (self._cache or self._new_cache()) if keeps else None
        query = self._query(x if real is None else x.masked_fill(~real.unsqueeze(-1), 0.0))
        weights_now = versions((self.k_proj, self.v_proj, self.k_norm)) if keeps else None
        source = None if cache is None else cache.source_made_from(kv, kv_real, weights_now)
        if source is not None:
            key, value = source.key, source.value
        else:
            clean = kv if kv_real is None else kv.masked_fill(~kv_real.unsqueeze(-1), 0.0)
            key, value = self._key(clean), self._value(clean)
        heads, weights = attend_source(
            self.kernel, query, key, value, kv_real, attn_bias, self._dropping, return_weights
        )
        out = self._projected_out(heads)
        if real is not None:
            out = out.masked_fill(~real.unsqueeze(-1), 0.0)
            weights = None if weights is None else weights.masked_fill(~real[:, None, :, None], 0.0)
        if cache is not None and source is None:
            cache.keep_source(Source.of(key, value, kv, kv_real, weights_now))
            self._cache = cache
        return out, weights

    def _query(self, x: Tensor) -> Tensor:
        return _heads(project(self.q_proj, x), self.num_heads, self.head_dim, self.q_norm)

    def _key(self, x: Tensor) -> Tensor:
        return _heads(project(self.k_proj, x), self.num_groups, self.head_dim, self.k_norm)

    def _value(self, x: Tensor) -> Tensor:
        return _heads(project(self.v_proj, x), self.num_groups, self.head_dim, None)

    @property
    def _dropping(self) -> float:
        return self.dropout if self.training else 0.0

    def _projected_out(self, heads: Tensor) -> Tensor:
        return project(self.out_proj, heads.transpose(1, 2).reshape(heads.shape[0], heads.shape[2], -1))


def _heads(projected: Tensor, number: int, head_dim: int, norm: nn.Module | None) -> Tensor:
    """[B, L, number * D] as heads [B, number, L, D], normed one by one where a norm is given."""
    heads = projected.reshape(projected.shape[0], projected.shape[1], number, head_dim)
    return (heads if norm is None else norm(heads)).transpose(1, 2)
