"""Additional outputs of blocks and stacks, on request: attention weights and hidden states."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import ArgumentError
from .branches import accepts


class BlockOutput(NamedTuple):
    """Result of a block that was called with `return_weights=True`."""

    states: Tensor
    """[B, L, E], the result of a call without `return_weights`."""
    weights: Tensor
    """[B, H, L, S] of the self-attention, before dropout."""
    cross_weights: Tensor | None = None
    """[B, H, L, S] over the source, before dropout; None in a block without cross-attention."""


class StackOutput(NamedTuple):
    """Result of a stack with additional outputs; a field that was not requested is None."""

    states: Tensor
    """[B, L, E] after the last norm: the result of a call without additional outputs."""
    hidden_states: tuple[Tensor, ...] | None = None
    """[B, L, E] each: the input of the first block, then the output of every block, the last one after the last norm.
    Values at padding are undefined."""
    attentions: tuple[Tensor, ...] | None = None
    """[B, H, L, S] of each block's self-attention, before dropout."""
    cross_attentions: tuple[Tensor, ...] | None = None
    """[B, H, L, S] of each block that reads the source, before dropout; None without a source."""


def keeping_weights(attention: Callable[..., Any], kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """A branch that gives the output of `attention` and appends its weights to `kept`."""

    def attend(x: Tensor) -> Tensor:
        out: Tensor
        out, weights = attention(x, return_weights=True)
        kept.append(weights)
        return out

    return attend


def block_with_weights(number: int, block: nn.Module, x: Tensor, given: dict[str, Any]) -> BlockOutput:
    """The result of a block with its weights. Raises ArgumentError if the block does not give them."""
    out = block(x, **given, return_weights=True) if accepts(block, "return_weights") else None
    # A wrapper can turn the named tuple into a plain tuple.
    if not isinstance(out, tuple) or not 2 <= len(out) <= 3:
        raise ArgumentError(
            "output_attentions: expected blocks whose forward takes return_weights=True and then returns "
            f"(states, weights) or (states, weights, cross_weights), got another in block {number}, "
            f"{type(block).__name__}"
        )
    return BlockOutput(*out)
