"""Biases of scores: masks as numbers, a caller's bias, and the order of its columns.

One rule holds for every path, dtype and device: -inf alone hides a key, and a finite number stays finite. Biases are
formed and added in at least float32, so a query with nothing but very low numbers attends to its keys alike, as the
same sum in float64 would have it.

A caller counts columns as [tokens held before the call, this call's tokens as given]; the kernel works on packed
queries, and on keys as [sinks, slots of the context]. Only biases and weights, where somebody asks for them, need the
way between.
"""

import torch
from torch import Tensor

from ..cache import KeyValueView, Lengths, Step

HIDDEN = float("-inf")

HALF_DTYPES = (torch.float16, torch.bfloat16)


def as_bias(seen: Tensor) -> Tensor:
    """A mask, bool (true: seen), as a float32 bias: 0 or -inf. Of at least one dimension."""
    if seen.ndim == 0:
        # A number alone would be rounded to the dtype of what it is added to.
        seen = seen.unsqueeze(0)
    return torch.zeros((), dtype=torch.float32, device=seen.device).expand(seen.shape).masked_fill(~seen, HIDDEN)


def given_bias(given: Tensor, query: Tensor) -> Tensor:
    """A caller's mask or float bias for these queries [B, H, L, D]: at least float32, and of at least one dimension."""
    if given.dtype == torch.bool:
        return as_bias(given)
    if given.ndim == 0:
        given = given.unsqueeze(0)
    if given.dtype not in (torch.float32, torch.float64):
        given = given.float()
    added = scores_dtype(query) if takes_float32_bias(query) else query.dtype
    if torch.finfo(added).max >= torch.finfo(given.dtype).max:
        return given
    # Half of the largest number: what a position scheme adds then leaves it finite.
    largest = torch.finfo(added).max / 2
    return given.clamp(-largest, largest).masked_fill(given == HIDDEN, HIDDEN).float()


def takes_float32_bias(query: Tensor) -> bool:
    """Whether SDPA adds a float32 bias to the scores of 16-bit queries as it is: on the CPU.

    Elsewhere it takes one of their dtype alone; so does whatever an exported graph is for, such as ONNX.
    """
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return query.is_cpu and not exporting


def scores_dtype(query: Tensor) -> torch.dtype:
    """The dtype of the scores of these queries: float64 for float64, else float32."""
    return torch.float64 if query.dtype is torch.float64 else torch.float32


def causal_bias(query: Tensor, key: Tensor) -> Tensor:
    """float32 [L, S] for `query` [B, H, L, D] that ends `key` [B, G, S, D]: -inf for what follows a query."""
    new, keys = query.shape[2], key.shape[2]
    return torch.full((new, keys), HIDDEN, dtype=torch.float32, device=query.device).triu(1 + keys - new)


def is_fully_masked(bias: Tensor, sink_bias: Tensor | None = None) -> Tensor:
    """True for queries whose every key is hidden, bool [..., L, 1]."""
    fully_masked = (bias == HIDDEN).all(-1, keepdim=True)
    return fully_masked if sink_bias is None else fully_masked & (sink_bias == HIDDEN).all(-1, keepdim=True)


class BiasLayout:
    """The way from a caller's columns [B, H, L, S] to the kernel's [B, H, width, n + slots], and back."""

    def __init__(self, step: Step, context: KeyValueView, held: Lengths) -> None:
        self.step = step
        self.held = held
        self.count = max(held) + step.tokens
        plain = step.real is None and step.uniform and context.uniform and context.sink_key is None
        self._column = None if plain else self._columns(context)

    def to_kernel(self, bias: Tensor) -> Tensor:
        """A bias that broadcasts to [B, H, L, S] for the kernel's queries and keys."""
        if self.step.order is not None and bias.ndim > 1 and bias.shape[-2] > 1:
            bias = _at_least_4d(bias).take_along_dim(self.step.order[:, None, :, None], 2)
        elif bias.ndim > 1 and bias.shape[-2] > self.step.width:
            bias = bias[..., : self.step.width, :]
        if self._column is not None and bias.shape[-1] > 1:
            bias = _at_least_4d(bias).take_along_dim(self._column[:, None, None, :], 3)
        return bias

    def from_kernel(self, weights: Tensor) -> Tensor:
        """Weights of the kernel's queries and keys as [B, H, L, S]; 0 for padding."""
        if self._column is not None:
            column = self._column[:, None, None, :].expand(weights.shape)
            # A sink is met in two places, in one of them with weight 0: the sum is its weight.
            weights = weights.new_zeros(*weights.shape[:3], self.count).scatter_add(3, column, weights)
        return self.step.unpack(weights, dim=2)

    def _columns(self, context: KeyValueView) -> Tensor:
        """The caller's column of each sink and slot, int64 [1 or B, n + slots]; any column for a slot without token."""
        step, device = self.step, context.key.device
        slots = context.first.column() + torch.arange(context.key.shape[2], device="cpu")
        number = 0 if context.sink_key is None else context.sink_key.shape[2]
        position = torch.cat((torch.arange(number, device="cpu").expand(slots.shape[0], -1), slots), 1)
        before, held = step.past_lengths.column(), self.held.column()
        # Sinks that were let go stand first among the held, the others where the buffer has them.
        old = torch.where(position < context.start.column(), position, position - before + held)
        new = (position - before).clamp(0, step.width - 1).to(device)
        if step.order is not None:
            new = step.order.take_along_dim(new.expand(step.batch, -1), 1)
        column = torch.where((position < before).to(device), old.to(device), max(self.held) + new)
        return column.clamp(0, self.count - 1)


def _at_least_4d(bias: Tensor) -> Tensor:
    return bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
