"""Scores, softmax, weighted values: the one place that calls a kernel and the one that chooses it.

Two ways give the same result. *Fused* is PyTorch's `scaled_dot_product_attention`. *Products* are two matrix products
and a softmax in at least float32: the reference, the way of soft caps, weights and sinks that are met near, and on the
CPU the quicker one where the queries of a block are few. Groups are folded into the queries of their key/value head, so
that each key is read once and none is repeated.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

FEW_QUERIES = 64
"""Query rows per key/value head up to which products beat the fused kernel on the CPU in float32 and float64."""


MANY_KEYS = 1024
"""Keys from which on that holds; over fewer the fused kernel has less overhead."""

MANY_NARROW_KEYS = 8192
"""The same for bfloat16, where a single row meets each key/value head: by 1.7 times at 16,384 keys."""

KEY_BLOCK = 4096
"""Values summed at once: over more, products of few rows slow down on the CPU."""

HIDDEN = float("-inf")


@dataclass(frozen=True)
class Sinks:
    """Keys and values [B, G, n, D] met apart, the queries [B, H, L, D] as they stand towards them, and their bias."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


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

        `bias` is added to the scaled scores and broadcasts to [B, H, L, S]; -inf hides a key. `causal=True` hides keys
        above the diagonal and is for L = S alone. Weights [B, H, L, n + S] (sinks first) are those before dropout.
        """
        if self.softcap is not None or sinks is not None or return_weights or self._few(query, key):
            if causal:
                bias = _causal_bias(query, key)
            return self._products(query, key, value, bias, sinks, dropout, return_weights)
        return self._fused(query, key, value, bias, causal, dropout), None

    def _few(self, query: Tensor, key: Tensor) -> bool:
        if query.device.type != "cpu" or key.shape[2] < MANY_KEYS:
            return False
        rows = query.shape[2] * (query.shape[1] // key.shape[1])
        if query.dtype is torch.bfloat16:
            return rows == 1 and key.shape[2] >= MANY_NARROW_KEYS
        return rows <= FEW_QUERIES and query.dtype in (torch.float32, torch.float64)

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, dropout: float
    ) -> Tensor:
        batch, heads, length, head_dim = query.shape
        groups = key.shape[1]
        per_group = heads // groups
        if bias is not None:
            bias = bias.to(query.dtype)
        if per_group == 1:
            return self._sdpa(query, key, value, bias, causal, dropout)
        if length == 1:
            folded = query.reshape(batch, groups, per_group, head_dim)
            if bias is not None:
                bias = _grouped(bias, groups, per_group).squeeze(3)
            return self._sdpa(folded, key, value, bias, False, dropout).reshape(batch, heads, 1, head_dim)
        # Groups beside the batch, and each key seen by all queries of its group through a stride of 0.
        query = rearrange(query, "b (g r) l d -> (b g) r l d", g=groups)
        key, value = (repeat(x, "b g s d -> (b g) r s d", r=per_group) for x in (key, value))
        if bias is not None and bias.ndim > 2:
            bias = _grouped(bias, groups, per_group)
            bias = bias.expand(batch, groups, *bias.shape[2:]).flatten(0, 1)
        out = self._sdpa(query, key, value, bias, causal, dropout)
        return rearrange(out, "(b g) r l d -> b (g r) l d", g=groups)

    def _sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, dropout: float
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, bias, dropout_p=dropout, is_causal=causal, scale=self.scale
        )

    def _products(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        sinks: Sinks | None,
        dropout: float,
        return_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        scores = self._scores(query, key, bias)
        if sinks is not None:
            scores = torch.cat((self._scores(sinks.query, sinks.key, sinks.bias), scores), -1)
        weights = torch.softmax(scores, -1)
        dropped = F.dropout(weights, dropout) if dropout else weights
        if sinks is None:
            out = _weighted(dropped, value, _stays_narrow(query, key))
        else:
            number = sinks.key.shape[2]
            # Two sums, each rounded to 8 bits, would be off by more than one.
            out = _weighted(dropped[..., :number], sinks.value, False)
            out = out + _weighted(dropped[..., number:], value, False)
        out = out.view(query.shape).to(query.dtype)
        return out, weights.view(*query.shape[:3], weights.shape[-1]).to(query.dtype) if return_weights else None

    def _scores(self, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        """Scaled, capped and biased scores [B * G, H / G * L, S], float32 at least."""
        batch, heads, length, head_dim = query.shape
        groups, keys = key.shape[1:3]
        as_it_lies = _stays_narrow(query, key)
        query = (query if as_it_lies else _working(query)).reshape(batch * groups, heads // groups * length, head_dim)
        key = (key if as_it_lies else _working(key)).reshape(batch * groups, keys, head_dim)
        nothing = query.new_empty(1, 1, 1)
        if as_it_lies:
            scores = _narrow_scores(query, key).mul_(self.scale)
        elif query.shape[1] <= FEW_QUERIES and bias is None:
            # Keys times queries: the long operand is then read as it lies, up to twice as quick on the CPU.
            scores = torch.baddbmm(nothing, key, query.transpose(1, 2), beta=0, alpha=self.scale).transpose(1, 2)
        else:
            scores = torch.baddbmm(nothing, query, key.transpose(1, 2), beta=0, alpha=self.scale)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if bias is not None:
            per_group = heads // groups
            grouped = scores.view(batch, groups, per_group, length, keys)
            scores = (grouped + _grouped(bias, groups, per_group).to(scores.dtype)).view_as(scores)
        return scores


def _weighted(weights: Tensor, value: Tensor, narrow: bool) -> Tensor:
    """Values summed by weights [B * G, H / G * L, S], in the dtype of the weights or of the values."""
    if narrow:
        narrow_weights = weights.to(value.dtype)
        return torch.stack([torch.mm(w, v) for w, v in zip(narrow_weights, value.flatten(0, 1), strict=True)])
    value = _working(value).reshape(value.shape[0] * value.shape[1], *value.shape[2:])
    out = torch.bmm(weights[:, :, :KEY_BLOCK], value[:, :KEY_BLOCK])
    for begin in range(KEY_BLOCK, value.shape[1], KEY_BLOCK):
        end = begin + KEY_BLOCK
        out = torch.baddbmm(out, weights[:, :, begin:end], value[:, begin:end])
    return out


def _stays_narrow(query: Tensor, key: Tensor) -> bool:
    """Whether one row in bfloat16 on the CPU meets each key/value head: keys are then read as they are stored."""
    return query.dtype is torch.bfloat16 and query.shape[1:3] == (key.shape[1], 1) and query.device.type == "cpu"


def _narrow_scores(query: Tensor, key: Tensor) -> Tensor:
    """`query` [N, 1, D] times `key` [N, S, D] in bfloat16: float32 [N, 1, S], exact to 16 bits.

    The sum of a product, which is rounded to 8 bits, and of what that rounding left over, which is formed likewise.
    Head by head: heads that do not lie side by side, as in a buffer with room, are slow as one batch.
    """
    rough = [torch.mm(q, k.t()) for q, k in zip(query, key, strict=True)]
    rest = [torch.addmm(r, q, k.t(), beta=-1) for r, q, k in zip(rough, query, key, strict=True)]
    return torch.stack(rough).float().add_(torch.stack(rest))


def _working(x: Tensor) -> Tensor:
    """16-bit numbers as float32: scores of 8 or 11 bits would lose what a fused kernel keeps."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _grouped(bias: Tensor, groups: int, per_group: int) -> Tensor:
    """A bias that broadcasts to [B, H, L, S] as one of five dimensions that broadcasts to [B, G, H / G, L, S]."""
    bias = bias.view((1,) * (4 - bias.ndim) + bias.shape)
    if bias.shape[1] == 1:
        return bias.unsqueeze(1)
    return bias.view(bias.shape[0], groups, per_group, *bias.shape[2:])


def _causal_bias(query: Tensor, key: Tensor) -> Tensor:
    return torch.full((query.shape[2], key.shape[2]), HIDDEN, device=query.device).triu(1)


def as_bias(given: Tensor) -> Tensor:
    """A mask (bool, true: seen) as a float bias, 0 or -inf; a float bias as it is."""
    if given.dtype != torch.bool:
        return given
    return torch.zeros((), device=given.device).expand(given.shape).masked_fill(~given, HIDDEN)


def sees_nothing(bias: Tensor, sink_bias: Tensor | None = None) -> Tensor:
    """True for queries whose every key is hidden, bool [..., L, 1]."""
    blind = (bias == HIDDEN).all(-1, keepdim=True)
    return blind if sink_bias is None else blind & (sink_bias == HIDDEN).all(-1, keepdim=True)
