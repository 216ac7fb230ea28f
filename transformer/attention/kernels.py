"""The one place that calls a kernel and the one that chooses it.

Two ways give the same result: *fused* is PyTorch's `scaled_dot_product_attention`, *products* are those of products.py.
In all of them each key is read once for the queries of its group, and none is repeated. While `sdpa_kernel` or its kin
restrict the backends of `scaled_dot_product_attention`, nothing else stands in for it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ..tracing import is_traced, is_transformed
from . import private_operators, split_kv
from .biases import HALF_DTYPES, causal_bias, given_bias, takes_float32_bias
from .matmul import MAX_MATMUL_QUERIES, MIN_ONEDNN_KEYS, AttentionInputs, MatmulAttention, Sinks, grouped

MIN_MATMUL_KEYS = 1024
"""Keys from which on products of few queries beat the fused kernel on the CPU; over fewer it has less overhead."""

MIN_HALF_MATMUL_KEYS = 1024
"""The same in 16 bits, of all key/value heads together, on processors without products of 16-bit numbers: 3 times at
2,048 keys of 16 heads, 1.5 times at 128 (AMD EPYC). With them the fused kernel leads by 3 to 6 times (Intel Xeon)."""

MIN_SHARED_HEAD_KEYS = 16_384
"""bfloat16 keys of one head from which on two cores each take half of its query rows: 569 beside 711 microseconds for 8
rows; two rows are two tasks at any length, 309 beside 714 (Intel Xeon)."""

MAX_MATMUL_ROWS_OVER_LONG_KEYS = 16
"""Query rows of such a head up to which products are quicker again over `LONG` float32 keys: 3.4 beside 3.9 ms."""


@dataclass(frozen=True)
class Kernel:
    """What stays the same for all blocks of all calls of a module."""

    scale: float
    softcap: float | None = None

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        *,
        causal: bool = False,
        sinks: Sinks | None = None,
        dropout: float = 0.0,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `query` [B, H, L, D] over `key`, `value` [B, G, S, D]: output [B, H, L, D], weights or None.

        `bias` is added to the scaled scores and broadcasts to [B, H, L, S]; -inf hides a key. `causal=True` is for L
        queries that are the last of S keys: it hides what follows a query. Weights [B, H, L, n + S] (sinks first) are
        those before dropout.
        """
        if not query.is_meta and torch.is_autocast_enabled(query.device.type):
            return _outside_autocast(self, query, key, value, bias, causal, sinks, dropout, return_weights)
        alone = is_cpu_inference(query) and not dropout
        plain = self.softcap is None and sinks is None and not return_weights
        if plain and alone and bias is None:
            if use_split_kv(query, key):
                return split_kv.split_kv(query, key, value, self.scale), None
            if causal and self.use_prefix_merge(query, key):
                return split_kv.prefix_and_causal(query, key, value, self.scale), None
        if causal and (query.shape[2] < key.shape[2] or not plain or use_matmul(query, key)):
            bias, causal = causal_bias(query, key), False
        if plain and not use_matmul(query, key):
            return self._fused(query, key, value, bias, causal, dropout), None
        products, operands = MatmulAttention(self.scale, self.softcap), AttentionInputs(query, key, value, bias, sinks)
        if alone and not return_weights:
            return products.tiled(operands), None
        out, weights = products(operands, dropout)
        return out, weights if return_weights else None

    def traced(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        *,
        causal: bool = False,
        sinks: Sinks | None = None,
        dropout: float = 0.0,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The same without a choice by a size and without a private operator, so that one graph serves every length.

        `causal=True` is for as many queries as keys.
        """
        if not query.is_meta and torch.is_autocast_enabled(query.device.type):
            return _outside_autocast(self.traced, query, key, value, bias, causal, sinks, dropout, return_weights)
        plain = self.softcap is None and sinks is None and not return_weights
        # Transforms run SDPA's kernel on the CPU once for each entry.
        plain = plain and not is_transformed(query, key, value)
        if causal and (bias is not None or not plain):
            order = causal_bias(query, key)
            bias, causal = order if bias is None else bias + order, False
        if plain:
            return self._sdpa(query, key, value, bias, causal, dropout), None
        out, weights = MatmulAttention(self.scale, self.softcap).traced(
            AttentionInputs(query, key, value, bias, sinks), dropout
        )
        return out, weights if return_weights else None

    def use_prefix_merge(self, query: Tensor, key: Tensor) -> bool:
        """Whether causal order alone is quicker for this chunk, which ends its keys, than a mask that says the same."""
        new, held = query.shape[2], key.shape[2] - query.shape[2]
        if self.softcap is not None or new < 2 or held < split_kv.MIN_PREFIX:
            return False
        return (
            (private_operators.SDPA_WITH_LSE or query.dtype in HALF_DTYPES)
            and is_cpu_inference(query)
            and not use_matmul(query, key)
            and not private_operators.sdpa_is_restricted()
        )

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, dropout: float
    ) -> Tensor:
        batch, heads, length, head_dim = query.shape
        groups = key.shape[1]
        per_group = heads // groups
        if per_group == 1:
            return self._sdpa(query, key, value, bias, causal, dropout)
        if length == 1:
            tasks = _tasks(query, key) if bias is None else 1
            folded = query.reshape(batch, groups * tasks, per_group // tasks, head_dim)
            if bias is not None:
                bias = grouped(bias, groups, per_group).squeeze(3)
            return self._sdpa(folded, key, value, bias, False, dropout).reshape(batch, heads, 1, head_dim)
        if bias is None or query.is_cpu:
            # The CPU's kernel reads each key once for all heads of its group, and copies none.
            return self._sdpa(query, key, value, bias, causal, dropout)
        return self._folded(query, key, value, bias, dropout)

    def _folded(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float) -> Tensor:
        """Groups beside the batch, and each key seen by all queries of its group through a stride of 0.

        On other devices, where no quick kernel takes groups and a mask together.
        """
        batch, groups = key.shape[:2]
        per_group = query.shape[1] // groups
        query = rearrange(query, "b (g r) l d -> (b g) r l d", g=groups)
        key, value = (repeat(x, "b g s d -> (b g) r s d", r=per_group) for x in (key, value))
        if bias.ndim > 2:
            bias = grouped(bias, groups, per_group)
            bias = bias.expand(batch, groups, *bias.shape[2:]).flatten(0, 1)
        out = self._sdpa(query, key, value, bias, False, dropout)
        return rearrange(out, "(b g) r l d -> b (g r) l d", g=groups)

    def _sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, dropout: float
    ) -> Tensor:
        if bias is not None:
            if query.dtype not in HALF_DTYPES or not takes_float32_bias(query):
                bias = bias.to(query.dtype)
            # Of three dimensions it would make SDPA form all scores.
            bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        # Under `jit.trace` sizes are tensors; there groups of one head are let pass as groups.
        jit = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            bias,
            dropout_p=dropout,
            is_causal=causal,
            scale=self.scale,
            enable_gqa=jit or bool(query.shape[1] != key.shape[1]),
        )


def _outside_autocast(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    causal: bool,
    sinks: Sinks | None,
    dropout: float,
    return_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """`attend` of what autocast makes 16 bits wide, but not within it: it would round biases and scores as well."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.dtype is torch.float32 else x

    query, key, value = cast(query), cast(key), cast(value)
    if bias is not None:
        bias = given_bias(bias, query)
    if sinks is not None:
        sinks = Sinks(cast(sinks.query), cast(sinks.key), cast(sinks.value), sinks.bias)
    with torch.autocast(device, enabled=False):
        return attend(
            query, key, value, bias, causal=causal, sinks=sinks, dropout=dropout, return_weights=return_weights
        )


def is_cpu_inference(query: Tensor) -> bool:
    """Whether these are numbers on the CPU that nobody records."""
    return query.is_cpu and not torch.is_grad_enabled() and not is_traced(query)


def use_split_kv(query: Tensor, key: Tensor) -> bool:
    """Whether one token meets so few key/value heads, and so many keys, that parts of the keys are worth merging."""
    few_heads = key.shape[0] * key.shape[1] in split_kv.SPLIT_KV_HEADS
    if not few_heads or query.shape[2] != 1 or key.shape[2] < split_kv.MIN_SPLIT_KEYS or query.dtype in HALF_DTYPES:
        return False
    rows = query.shape[1] // key.shape[1]
    if not private_operators.SDPA_WITH_LSE or private_operators.sdpa_is_restricted():
        return False
    # Over so many keys products use both cores for one head, and lead while rows are few.
    return (
        query.dtype is not torch.float32
        or key.shape[2] < MIN_ONEDNN_KEYS
        or not 1 < rows <= MAX_MATMUL_ROWS_OVER_LONG_KEYS
    )


def use_matmul(query: Tensor, key: Tensor) -> bool:
    """Whether the queries of each key/value head are so few that products are the quicker way."""
    if not query.is_cpu:
        return False
    rows = query.shape[2] * (query.shape[1] // key.shape[1])
    if query.dtype in private_operators.FUSED_HALF_DTYPES:
        return False
    if query.dtype in HALF_DTYPES:
        few = rows == 1 if query.dtype is torch.bfloat16 else rows <= MAX_MATMUL_QUERIES
        few = few and key.shape[0] * key.shape[1] * key.shape[2] >= MIN_HALF_MATMUL_KEYS
    else:
        few = rows <= MAX_MATMUL_QUERIES and key.shape[2] >= MIN_MATMUL_KEYS
    return few and not private_operators.sdpa_is_restricted()


def _tasks(query: Tensor, key: Tensor) -> int:
    """Tasks for the query rows of one key/value head in the fused kernel: two for two rows, or for a lone head.

    Each task reads the keys again.
    """
    rows = query.shape[1] // key.shape[1]
    if query.dtype is not torch.bfloat16 or query.dtype not in private_operators.FUSED_HALF_DTYPES or not query.is_cpu:
        return 1
    lone = key.shape[0] * key.shape[1] == 1 and rows % 2 == 0 and key.shape[2] >= MIN_SHARED_HEAD_KEYS
    return 2 if lone or rows == 2 else 1
