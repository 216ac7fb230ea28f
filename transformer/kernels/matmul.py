"""Attention as two matrix products and a softmax in at least float32: what SDPA cannot do, or does slowly.

It serves soft caps, weights and sinks, and on the CPU it is faster for few query rows per key/value head. On
the CPU a few heads are computed at a time, and 16-bit keys and values are upcast a block at a time: what is formed
stays in the processor's cache, and in memory that was in use before. Tiles have equal size, so that no core waits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import private_operators, tuning
from .biases import HALF_DTYPES, bias_by_group, changed_scores
from .inputs import AttentionInputs, Sinks, upcast
from .sink_logits import softmax_of_scores


@dataclass
class MatmulAttention:
    """Scale and soft cap, which are the same in all calls of a module."""

    scale: float
    softcap: float | None = None

    def __call__(self, inputs: AttentionInputs, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Output [B, H, L, D], and weights [B, H, L, n + S] (sinks first) before dropout."""
        query = inputs.query
        out, weights = self._attend(inputs, _Upcast(), dropout)
        return out.to(query.dtype), weights.view(*query.shape[:3], weights.shape[-1]).to(query.dtype)

    def tiled(self, inputs: AttentionInputs) -> Tensor:
        """The same output, a few heads at a time: on the CPU, where no gradients are recorded."""
        batch, groups = inputs.key.shape[:2]
        at_once, buffers = _heads_per_tile(inputs.query, inputs.key), _Upcast(reuse=True)
        if at_once >= batch * groups:
            return self._attend(inputs, buffers)[0].to(inputs.query.dtype)
        rows_at_once, groups_at_once = even_tiles(batch, max(at_once // groups, 1)), even_tiles(groups, at_once)
        rows = []
        for row in range(0, batch, rows_at_once):
            rows_now = min(rows_at_once, batch - row)
            tiles = [(group, min(groups_at_once, groups - group)) for group in range(0, groups, groups_at_once)]
            parts = [inputs.part(row, rows_now, *tile) for tile in tiles]
            rows.append(torch.cat([self._attend(part, buffers)[0] for part in parts], 1))
        return torch.cat(rows).to(inputs.query.dtype)

    def _attend(self, inputs: AttentionInputs, buffers: "_Upcast", dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Output [B, H, L, D] and weights [B * G, H / G * L, n + S], both in at least float32."""
        query, value, sinks = inputs.query, inputs.value, inputs.sinks
        scores = self._scores(inputs, buffers)
        if sinks is not None:
            scores = torch.cat((self._scores(sinks, _Upcast()), scores), -1)
        logits = inputs.sink_logits
        if logits is not None:
            batch, groups = inputs.key.shape[:2]
            logits = logits.view(1, groups, -1, 1).expand(batch, -1, -1, query.shape[2]).reshape(*scores.shape[:2], 1)
        weights = softmax_of_scores(scores, inputs.change is not None, logits)
        dropped = F.dropout(weights, dropout) if dropout else weights
        number = 0 if sinks is None else sinks.key.shape[2]
        out = _weighted(dropped[..., number:], value, buffers)
        if sinks is not None:
            out = out + _weighted(dropped[..., :number], sinks.value, _Upcast())
        return out.view(*query.shape[:3], out.shape[-1]), weights

    def _scores(self, inputs: AttentionInputs | Sinks, buffers: "_Upcast") -> Tensor:
        """Scaled, capped, changed and biased scores [B * G, H / G * L, S]."""
        query, key, bias = inputs.query, inputs.key, inputs.bias
        batch, heads, length, head_dim = query.shape
        groups, keys = key.shape[1:3]
        query = upcast(query).reshape(batch * groups, heads // groups * length, head_dim)
        blocks = buffers.blocks(key.reshape(batch * groups, keys, head_dim))
        nothing = query.new_empty(1, 1, 1)
        if length == 1 or (query.shape[1] <= tuning.active.max_matmul_rows and bias is None):
            # Keys times queries: the long operand is then read in its layout, up to twice as fast on the CPU.
            columns = query.transpose(1, 2)
            scores = _joined([torch.baddbmm(nothing, block, columns, beta=0, alpha=self.scale) for block in blocks], 1)
            scores = scores.transpose(1, 2)
        else:
            transposed = (block.transpose(1, 2) for block in blocks)
            scores = _joined(
                [torch.baddbmm(nothing, query, block, beta=0, alpha=self.scale) for block in transposed], 2
            )
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if inputs.change is not None:
            each = scores.contiguous().view(batch, heads, length, keys)
            return changed_scores(each, inputs.change, bias).reshape(scores.shape)
        if bias is not None:
            per_group = heads // groups
            each = scores.contiguous().view(batch, groups, per_group, length, keys)
            scores = (each + bias_by_group(bias, groups, per_group).to(scores.dtype)).view(scores.shape)
        return scores


class _Upcast:
    """16-bit numbers as float32, since scores of 8 or 11 bits would lose what a fused kernel keeps; others as is."""

    def __init__(self, reuse: bool = False) -> None:
        self.reuse = reuse
        self._buffer: Tensor | None = None

    def blocks(self, x: Tensor) -> Iterator[Tensor]:
        """`x` [N, S, D] by its second dimension, where buffers are reused each overwrites the one before."""
        if not self.reuse or x.dtype not in HALF_DTYPES:
            yield upcast(x)
            return
        for block in torch.split(x, tuning.active.upcast_keys, 1):
            if self._buffer is None or self._buffer.numel() < block.numel():
                self._buffer = torch.empty(block.numel(), dtype=torch.float32, device=block.device)
            yield self._buffer[: block.numel()].view(block.shape).copy_(block)


def _weighted(weights: Tensor, value: Tensor, buffers: _Upcast) -> Tensor:
    """Values [B, G, S, D] summed by weights [B * G, H / G * L, S], in the dtype of the weights."""
    value = value.flatten(0, 1)
    # Before any size is asked for: only tiles reuse buffers, and they are never traced.
    long = (
        buffers.reuse
        and value.dtype is torch.float32
        and value.shape[1] >= tuning.active.min_onednn_keys
        and weights.shape[1] > 1
    )
    if long and private_operators.use_onednn():
        return torch.stack([private_operators.onednn_linear(*head) for head in zip(weights, value.mT, strict=True)])
    out, begin = None, 0
    for block in buffers.blocks(value):
        its_weights = weights[:, :, begin : begin + block.shape[1]]
        out = torch.bmm(its_weights, block) if out is None else torch.baddbmm(out, its_weights, block)
        begin += block.shape[1]
    return weights.new_zeros(*weights.shape[:2], value.shape[-1]) if out is None else out


def even_tiles(number: int, most: int) -> int:
    """The size of tiles of at most `most` that share `number` as evenly as possible."""
    tiles = -(-number // most)
    return -(-number // tiles)


def _heads_per_tile(query: Tensor, key: Tensor) -> int:
    """Key/value heads whose scores, or upcast keys, take about `tile_bytes` bytes; at least one."""
    keys, head_dim = key.shape[2:]
    scores = query.shape[1] // key.shape[1] * query.shape[2] * keys
    upcast_numbers = min(keys, tuning.active.upcast_keys) * head_dim if key.dtype in HALF_DTYPES else 0
    return max(tuning.active.tile_bytes // (4 * max(scores, upcast_numbers, 1)), 1)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
