"""Tensors of one call of attention, and how parts of them are cut: for every kernel the same shapes.

`B` rows of the batch, `L` queries, `S` keys, `H` query heads, `G` key/value heads, `D` head_dim, `n` sinks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .biases import HALF_DTYPES, ScoreChange, given_bias


class Sinks(NamedTuple):
    """Keys and values [B, G, n, D] with queries [B, H, L, D] of their own (at clamped positions), and their bias and
    change of scores."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    change: ScoreChange | None = None


class AttentionInputs(NamedTuple):
    """`query` [B, H, L, D], `key` and `value` [B, G, S, D], a bias that broadcasts to [B, H, L, S], sinks, a change of
    scores, and a logit of each head [H] beside its scores."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    sinks: Sinks | None = None
    change: ScoreChange | None = None
    sink_logits: Tensor | None = None

    def part(self, row: int, rows: int, group: int, groups: int) -> "AttentionInputs":
        """Those of some rows of the batch, and of some key/value heads and the queries that share them; without a
        change, which is of all heads."""
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
        logits = self.sink_logits
        if logits is not None:
            logits = logits.narrow(0, group * per_group, groups * per_group)
        tensors = queries(self.query), keys(self.key), keys(self.value)
        return AttentionInputs(*tensors, cut(self.bias), sinks, sink_logits=logits)

    def cast(self, dtype: torch.dtype) -> "AttentionInputs":
        """The same with what is float32 in the dtype of autocast; biases stay in at least float32."""

        def narrowed(x: Tensor) -> Tensor:
            return x.to(dtype) if x.dtype is torch.float32 else x

        query, key, value = narrowed(self.query), narrowed(self.key), narrowed(self.value)
        bias, sinks = self.bias, self.sinks
        if bias is not None:
            bias = given_bias(bias, query)
        if sinks is not None:
            sinks = sinks._replace(query=narrowed(sinks.query), key=narrowed(sinks.key), value=narrowed(sinks.value))
        return self._replace(query=query, key=key, value=value, bias=bias, sinks=sinks)


def upcast(x: Tensor) -> Tensor:
    """16-bit numbers as float32, since scores of 8 or 11 bits would lose what a fused kernel keeps; others as is."""
    return x.float() if x.dtype in HALF_DTYPES else x
