"""Reference of blocks in plain loops over float64: norms, feed-forward networks, residuals and stacks.

Nothing here is shared with the library; attention is the oracle's. The only things taken from a module are its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from tests.oracle import Conversation, Options, cross, dot, numbers
from tests.oracle_positions import Vector
from transformer.blocks import BlockStack, GatedFeedForward, RMSNorm

ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "relu": lambda v: max(v, 0.0),
    "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
    "gelu_tanh": lambda v: v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
    "silu": lambda v: v / (1 + math.exp(-v)),
}


def each(function: Callable[[Vector], Vector], x: Tensor) -> Tensor:
    """`function`, which keeps the width, of every vector along the last dimension, float64."""
    vectors = numbers(x.reshape(-1, x.shape[-1]))
    return torch.tensor([function(vector) for vector in vectors], dtype=torch.float64).reshape(x.shape)


def norm(module: nn.Module, vector: Vector) -> Vector:
    """Root mean square or layer norm, with the module's numbers."""
    size = len(vector)
    factors = [weight + (1.0 if module.unit_offset else 0.0) for weight in numbers(module.weight)]
    if isinstance(module, RMSNorm):
        root = math.sqrt(sum(v * v for v in vector) / size + module.eps)
        return [v / root * factor for v, factor in zip(vector, factors, strict=True)]
    mean = sum(vector) / size
    root = math.sqrt(sum((v - mean) ** 2 for v in vector) / size + module.eps)
    shifts = [0.0] * size if module.bias is None else numbers(module.bias)
    return [(v - mean) / root * factor + shift for v, factor, shift in zip(vector, factors, shifts, strict=True)]


def linear(module: nn.Linear, vector: Vector) -> Vector:
    shifts = [0.0] * module.out_features if module.bias is None else numbers(module.bias)
    return [dot(row, vector) + shift for row, shift in zip(numbers(module.weight), shifts, strict=True)]


def feed_forward(module: nn.Module, activation: Callable[[float], float], vector: Vector) -> Vector:
    """Plain or gated, with the module's weights and the activation of one number."""
    hidden = linear(module.up_proj, vector)
    if isinstance(module, GatedFeedForward):
        gates = linear(module.gate_proj, vector)
        hidden = [activation(gate) * up for gate, up in zip(gates, hidden, strict=True)]
    else:
        hidden = [activation(up) for up in hidden]
    return linear(module.down_proj, hidden)


def residual(
    module: nn.Module, placement: str, x: Tensor, branch: Callable[[Tensor], Tensor], scale: float = 1.0
) -> Tensor:
    """The stream with `scale` times what the branch adds, normed where the placement says."""
    if placement == "before":
        return x + scale * branch(each(lambda v: norm(module.norm_before, v), x))
    if placement == "after":
        return each(lambda v: norm(module.norm_after, v), x + scale * branch(x))
    added = branch(x if placement == "branch" else each(lambda v: norm(module.norm_before, v), x))
    return x + scale * each(lambda v: norm(module.norm_branch, v), added)


def parallel(
    block: nn.Module, x: Tensor, attend: Callable[[Tensor], Tensor], feed: Callable[[Tensor], Tensor]
) -> Tensor:
    """The stream with what attention and feed-forward network add, which read the same, by one norm or one each."""
    both = block.attention_residual, block.feed_forward_residual or block.attention_residual
    first, second = (each(lambda v, own=own: norm(own.norm_before, v), x) for own in both)
    return x + attend(first) + feed(second)


class StackConversation:
    """One stack over a series of calls: a conversation of the oracle's for every layer, one above the other.

    `layers` are the options of each layer's attention. What comes out at padding is left unsaid: 0 here.
    """

    def __init__(self, stack: BlockStack, layers: list[Options], placement: str, activation: str) -> None:
        self.stack, self.layers, self.placement = stack, layers, placement
        self.activation = ACTIVATIONS[activation]
        self.conversations = [
            Conversation(block.attention, own) for block, own in zip(stack.blocks, layers, strict=True)
        ]

    def call(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        mode: bool | None = None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        for block, conversation, options in zip(self.stack.blocks, self.conversations, self.layers, strict=True):

            def attend(x: Tensor, conversation: Conversation = conversation) -> Tensor:
                return conversation.call(x, mask, mode)[0]

            def feed(x: Tensor, module: nn.Module = block.feed_forward) -> Tensor:
                return each(lambda v: feed_forward(module, self.activation, v), x)

            if getattr(block, "residual", "sequential") != "sequential":
                x = parallel(block, x, attend, feed)
                continue
            x = residual(block.attention_residual, self.placement, x, attend)
            if getattr(block, "cross_attention", None) is not None:

                def read(x: Tensor, module: nn.Module = block.cross_attention, options: Options = options) -> Tensor:
                    return cross(module, replace(options, scheme=None), x, source, source_mask, mask)[0]

                x = residual(block.cross_attention_residual, self.placement, x, read)

            x = residual(block.feed_forward_residual, self.placement, x, feed)
        if self.stack.norm is not None:
            x = each(lambda v: norm(self.stack.norm, v), x)
        return x if mask is None else x.masked_fill(~mask[..., None], 0.0)
