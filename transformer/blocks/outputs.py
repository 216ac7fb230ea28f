"""Outputs of blocks and stacks beside their states, where a call asks for them: attention weights and hidden states."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import ArgumentError
from .branches import accepts


class BlockOutput(NamedTuple):
    """Result of a block that was called with `return_weights=True`."""

    states: Tensor
    """[B, L, E], what the block returns without it."""
    weights: Tensor
    """[B, H, L, S] of the self-attention, before dropout."""
    cross_weights: Tensor | None = None
    """[B, H, L, S] over the source, before dropout; None in a block that reads none."""


class StackOutput(NamedTuple):
    """Result of a stack that was asked for more than its states; a field that was not asked for is None."""

    states: Tensor
    """[B, L, E], what the stack returns otherwise: after its last norm."""
    hidden_states: tuple[Tensor, ...] | None = None
    """[B, L, E] each: the input of the first block, then the output of every block, the last one after the last norm.
    What stands at padding means nothing."""
    attentions: tuple[Tensor, ...] | None = None
    """[B, H, L, S] of each block's self-attention, before dropout."""
    cross_attentions: tuple[Tensor, ...] | None = None
    """[B, H, L, S] of each block that reads the source, before dropout; None without a source."""


def keeping_weights(attention: Callable[..., Any], kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """A branch that gives the output of `attention` alone, and appends its weights to `kept`."""

    def attend(x: Tensor) -> Tensor:
        out: Tensor
        out, weights = attention(x, return_weights=True)
        kept.append(weights)
        return out

    return attend


def block_with_weights(number: int, block: nn.Module, x: Tensor, given: dict[str, Any]) -> BlockOutput:
    """The result of a block of a stack that is asked for its weights.

    Raises ArgumentError where the block cannot give them.
    """
    out = block(x, **given, return_weights=True) if accepts(block, "return_weights") else None
    # A plain tuple where a wrapper has taken the named one apart.
    if not isinstance(out, tuple) or not 2 <= len(out) <= 3:
        raise ArgumentError(
            "output_attentions: expected blocks whose forward takes return_weights=True and then returns "
            f"(states, weights) or (states, weights, cross_weights), got another in block {number}, "
            f"{type(block).__name__}"
        )
    return BlockOutput(*out)
