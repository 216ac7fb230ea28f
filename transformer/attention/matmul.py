"""Attention as two matrix products and a softmax in at least float32: what the fused kernel cannot do, or does slowly.

The reference, the way of soft caps, weights and sinks that are met near, and on the CPU the quicker one where the
queries of a key/value head are few. On the CPU a few heads are worked on at a time, and 16-bit keys and values are
widened a block at a time: what is formed stays in the processor's cache, and in memory that was in use before. Turns
are of one size: a head that is left alone keeps one core idle.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import private_operators
from .biases import HALF_DTYPES

MAX_MATMUL_QUERIES = 64
"""Query rows per key/value head up to which these products beat the fused kernel on the CPU."""

TILE_BYTES = 9 << 20
"""Bytes of scores, or of widened keys, formed at once: larger ones are fresh pages in every call, half of a step."""

MIN_ONEDNN_KEYS = 20_000
"""Keys from which on oneDNN sums the values of one head with all threads: for a few rows of it the whole is 1.1 to 1.6
times as quick; one row alone is bound by memory either way."""

UPCAST_KEYS = 2048
"""Keys widened at once: 16 heads of D 64 then take those bytes."""


class Sinks(NamedTuple):
    """Keys and values [B, G, n, D] met apart, the queries [B, H, L, D] as they stand towards them, and their bias."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


class AttentionInputs(NamedTuple):
    """`query` [B, H, L, D], `key` and `value` [B, G, S, D], a bias that broadcasts to [B, H, L, S], and sinks."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    sinks: Sinks | None = None

    def part(self, row: int, rows: int, group: int, groups: int) -> "AttentionInputs":
        """Those of some rows of the batch, and of some key/value heads and the queries that share them."""
        per_group = self.query.shape[1] // self.key.shape[1]

        def keys(x: Tensor) -> Tensor:
            return x.narrow(0, row, rows).narrow(1, group, groups)

        def queries(x: Tensor) -> Tensor:
            return x.narrow(0, row, rows).narrow(1, group * per_group, groups * per_group)

        def cut(bias: Tensor | None) -> Tensor | None:
            if bias is not None and bias.ndim == 4 and bias.shape[0] > 1:
                bias = bias.narrow(0, row, rows)
            if bias is not None and bias.ndim > 2 and bias.shape[-3] > 1:
                bias = bias.narrow(-3, group * per_group, groups * per_group)
            return bias

        sinks = self.sinks
        if sinks is not None:
            sinks = Sinks(queries(sinks.query), keys(sinks.key), keys(sinks.value), cut(sinks.bias))
        return AttentionInputs(queries(self.query), keys(self.key), keys(self.value), cut(self.bias), sinks)


@dataclass
class MatmulAttention:
    """What stays the same for all calls of a module."""

    scale: float
    softcap: float | None = None

    def __call__(self, operands: AttentionInputs, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Output [B, H, L, D], and weights [B, H, L, n + S] (sinks first) before dropout."""
        query = operands.query
        out, weights = self._attend(operands, _Upcast(), dropout)
        return out.to(query.dtype), weights.view(*query.shape[:3], weights.shape[-1]).to(query.dtype)

    def traced(self, operands: AttentionInputs, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """The same output and weights where sizes are symbols: plain products, all at once, without a choice."""
        query, key, value, bias, sinks = operands
        scores = self._plain_scores(query, key, bias)
        if sinks is not None:
            scores = torch.cat((self._plain_scores(sinks.query, sinks.key, sinks.bias), scores), -1)
            value = torch.cat((sinks.value, value), 2)
        weights = torch.softmax(scores, -1)
        dropped = F.dropout(weights, dropout) if dropout else weights
        out = torch.einsum("bgrls,bgsd->bgrld", _by_group(dropped, key), _upcast(value)).flatten(1, 2)
        return out.to(query.dtype), weights.to(query.dtype)

    def _plain_scores(self, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        """Scaled, capped and biased scores [B, H, L, S]."""
        query = _by_group(_upcast(query) * self.scale, key)
        scores = torch.einsum("bgrld,bgsd->bgrls", query, _upcast(key)).flatten(1, 2)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        return scores if bias is None else scores + bias.to(scores.dtype)

    def tiled(self, operands: AttentionInputs) -> Tensor:
        """The same output, a few heads at a time: on the CPU, where no gradients are recorded."""
        batch, groups = operands.key.shape[:2]
        at_once, widened = _heads_per_tile(operands.query, operands.key), _Upcast(in_one_place=True)
        if at_once >= batch * groups:
            return self._attend(operands, widened)[0].to(operands.query.dtype)
        rows_at_once, groups_at_once = even_tiles(batch, max(at_once // groups, 1)), even_tiles(groups, at_once)
        rows = []
        for row in range(0, batch, rows_at_once):
            rows_now = min(rows_at_once, batch - row)
            turns = [(group, min(groups_at_once, groups - group)) for group in range(0, groups, groups_at_once)]
            parts = [operands.part(row, rows_now, *turn) for turn in turns]
            rows.append(torch.cat([self._attend(part, widened)[0] for part in parts], 1))
        return torch.cat(rows).to(operands.query.dtype)

    def _attend(self, operands: AttentionInputs, widened: "_Upcast", dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Output [B, H, L, D] and weights [B * G, H / G * L, n + S], both in at least float32."""
        query, key, value, bias, sinks = operands
        scores = self._scores(query, key, bias, widened)
        if sinks is not None:
            scores = torch.cat((self._scores(sinks.query, sinks.key, sinks.bias, _Upcast()), scores), -1)
        weights = torch.softmax(scores, -1)
        dropped = F.dropout(weights, dropout) if dropout else weights
        number = 0 if sinks is None else sinks.key.shape[2]
        out = _weighted(dropped[..., number:], value, widened)
        if sinks is not None:
            out = out + _weighted(dropped[..., :number], sinks.value, _Upcast())
        return out.view(query.shape), weights

    def _scores(self, query: Tensor, key: Tensor, bias: Tensor | None, widened: "_Upcast") -> Tensor:
        """Scaled, capped and biased scores [B * G, H / G * L, S]."""
        batch, heads, length, head_dim = query.shape
        groups, keys = key.shape[1:3]
        query = _upcast(query).reshape(batch * groups, heads // groups * length, head_dim)
        blocks = widened.blocks(key.reshape(batch * groups, keys, head_dim))
        nothing = query.new_empty(1, 1, 1)
        if length == 1 or (query.shape[1] <= MAX_MATMUL_QUERIES and bias is None):
            # Keys times queries: the long operand is then read as it lies, up to twice as quick on the CPU.
            few = query.transpose(1, 2)
            scores = _joined([torch.baddbmm(nothing, block, few, beta=0, alpha=self.scale) for block in blocks], 1)
            scores = scores.transpose(1, 2)
        else:
            turned = (block.transpose(1, 2) for block in blocks)
            scores = _joined([torch.baddbmm(nothing, query, block, beta=0, alpha=self.scale) for block in turned], 2)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if bias is not None:
            per_group = heads // groups
            each = scores.contiguous().view(batch, groups, per_group, length, keys)
            scores = (each + grouped(bias, groups, per_group).to(scores.dtype)).view(scores.shape)
        return scores


class _Upcast:
    """16-bit numbers as float32, since scores of 8 or 11 bits would lose what a fused kernel keeps; others as is."""

    def __init__(self, in_one_place: bool = False) -> None:
        self.in_one_place = in_one_place
        self._place: Tensor | None = None

    def blocks(self, x: Tensor) -> Iterator[Tensor]:
        """`x` [N, S, D] by its second dimension; in one place, each overwrites the one before."""
        if not self.in_one_place or x.dtype not in HALF_DTYPES:
            yield _upcast(x)
            return
        for block in torch.split(x, UPCAST_KEYS, 1):
            if self._place is None or self._place.numel() < block.numel():
                self._place = torch.empty(block.numel(), dtype=torch.float32, device=block.device)
            yield self._place[: block.numel()].view(block.shape).copy_(block)


def _weighted(weights: Tensor, value: Tensor, widened: _Upcast) -> Tensor:
    """Values [B, G, S, D] summed by weights [B * G, H / G * L, S], in the dtype of the weights."""
    value = value.flatten(0, 1)
    # Before any size is asked for: only turns are in one place, and they are never traced.
    long = (
        widened.in_one_place
        and value.dtype is torch.float32
        and value.shape[1] >= MIN_ONEDNN_KEYS
        and weights.shape[1] > 1
    )
    if long and private_operators.use_onednn():
        return torch.stack([private_operators.onednn_linear(*head) for head in zip(weights, value.mT, strict=True)])
    out, begin = None, 0
    for block in widened.blocks(value):
        its_weights = weights[:, :, begin : begin + block.shape[1]]
        out = torch.bmm(its_weights, block) if out is None else torch.baddbmm(out, its_weights, block)
        begin += block.shape[1]
    return weights.new_zeros(*weights.shape[:2], value.shape[-1]) if out is None else out


def _by_group(x: Tensor, key: Tensor) -> Tensor:
    """`x` [B, H, L, n] as [B, G, H / G, L, n]: a length that is a symbol stays a dimension of its own."""
    grouped: Tensor = x.unflatten(1, (key.shape[1], -1))  # type: ignore[no-untyped-call]
    return grouped


def even_tiles(number: int, most: int) -> int:
    """The size of turns of at most so many that share the number as evenly as can be."""
    turns = -(-number // most)
    return -(-number // turns)


def _heads_per_tile(query: Tensor, key: Tensor) -> int:
    """Key/value heads whose scores, or widened keys, take about `TILE_BYTES` bytes; at least one."""
    keys, head_dim = key.shape[2:]
    scores = query.shape[1] // key.shape[1] * query.shape[2] * keys
    widened = min(keys, UPCAST_KEYS) * head_dim if key.dtype in HALF_DTYPES else 0
    return max(TILE_BYTES // (4 * max(scores, widened, 1)), 1)


def _upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF_DTYPES else x


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def grouped(bias: Tensor, groups: int, per_group: int) -> Tensor:
    """A bias that broadcasts to [B, H, L, S] as one of five dimensions that broadcasts to [B, G, H / G, L, S]."""
    bias = bias.view((1,) * (4 - bias.ndim) + bias.shape)
    if bias.shape[1] == 1:
        return bias.unsqueeze(1)
    return bias.view(bias.shape[0], groups, per_group, *bias.shape[2:])
