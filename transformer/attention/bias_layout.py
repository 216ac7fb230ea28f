"""Columns of a caller's bias, in the order in which the kernel reads keys, and of weights on the way back.

A caller counts columns as [cached tokens before the call, this call's tokens as given]; the kernel works on packed
queries, and on keys as [sinks, slots of the view]. Only a caller's bias, and weights on request, need the way
between.
"""

import torch
from torch import Tensor

from ..cache import KeyValueView, Lengths, Step


class BiasLayout:
    """The way from a caller's columns [B, H, L, S] to the kernel's [B, H, width, n + slots], and back."""

    def __init__(self, step: Step, view: KeyValueView, cached_lengths: Lengths) -> None:
        self.step = step
        self.cached_lengths = cached_lengths
        self.count = max(cached_lengths) + step.tokens
        plain = step.real is None and step.uniform and view.uniform and view.sink_key is None
        self._column = None if plain else self._columns(view)

    def to_kernel(self, bias: Tensor) -> Tensor:
        """A bias that broadcasts to [B, H, L, S] for the kernel's queries and keys."""
        run = self.step.run
        if run is not None and bias.ndim > 1 and bias.shape[-2] > 1:
            bias = _at_least_4d(bias).take_along_dim(run.order[:, None, :, None], 2)
        if self._column is not None and bias.shape[-1] > 1:
            bias = _at_least_4d(bias).take_along_dim(self._column[:, None, None, :], 3)
        return bias

    def from_kernel(self, weights: Tensor) -> Tensor:
        """Weights of the kernel's queries and keys as [B, H, L, S]; 0 for padding."""
        if self._column is not None:
            column = self._column[:, None, None, :].expand(weights.shape)
            # A sink has two columns, one of them with weight 0: the sum is its weight.
            weights = weights.new_zeros(*weights.shape[:3], self.count).scatter_add(3, column, weights)
        return weights if self.step.run is None else self.step.run.given_queries(weights)

    def _columns(self, view: KeyValueView) -> Tensor:
        """The caller's column of each sink and slot, int64 [1 or B, n + slots]; any column for a slot without token."""
        step, device = self.step, view.key.device
        slots = view.first.column() + torch.arange(view.key.shape[2], device="cpu")
        number = 0 if view.sink_key is None else view.sink_key.shape[2]
        position = torch.cat((torch.arange(number, device="cpu").expand(slots.shape[0], -1), slots), 1)
        before, cached = step.past_lengths.column(), self.cached_lengths.column()
        # Evicted sinks are the first columns, the others are where the buffer has them.
        old = torch.where(position < view.start.column(), position, position - before + cached)
        new = (position - before).clamp(0, step.width - 1).to(device)
        if step.run is not None:
            new = step.run.order.take_along_dim(new.expand(step.batch, -1), 1)
        column = torch.where((position < before).to(device), old.to(device), max(self.cached_lengths) + new)
        return column.clamp(0, self.count - 1)


def _at_least_4d(bias: Tensor) -> Tensor:
    return bias.reshape((1,) * (4 - bias.ndim) + bias.shape)


def added(bias: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two biases, of which None is one of 0."""
    if bias is None or other is None:
        return other if bias is None else bias
    return bias + other


def cut(bias: Tensor, dim: int, begin: int, end: int) -> Tensor:
    """A part of one dimension of a bias that broadcasts; a single entry is every part."""
    if bias.ndim < -dim or bias.shape[dim] == 1:
        return bias
    return bias.narrow(dim, begin, end - begin)
