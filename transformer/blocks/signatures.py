"""Signatures of blocks and stacks for type checkers: a tensor, or a named tuple for additional outputs.

The second overloads leave the other arguments open, so that these are listed once.
"""

from typing import Any, Literal, overload

from torch import Tensor

from ..cache import Step
from .outputs import BlockOutput, StackOutput


@overload
def encoder_block_call(
    self: Any,
    x: Tensor,
    expanding_context: bool | None = None,
    *,
    attention_mask: Tensor | None = None,
    step: Step | None = None,
    return_weights: Literal[False] = False,
) -> Tensor: ...


@overload
def encoder_block_call(
    self: Any, x: Tensor, *arguments: Any, return_weights: Literal[True], **keywords: Any
) -> BlockOutput: ...


def encoder_block_call(self: Any, x: Tensor, *arguments: Any, **keywords: Any) -> Any:
    """`EncoderBlock.forward`, to type checkers."""
    return self(x, *arguments, **keywords)


@overload
def decoder_block_call(
    self: Any,
    x: Tensor,
    source: Tensor | None = None,
    expanding_context: bool | None = None,
    *,
    attention_mask: Tensor | None = None,
    source_mask: Tensor | None = None,
    step: Step | None = None,
    return_weights: Literal[False] = False,
) -> Tensor: ...


@overload
def decoder_block_call(
    self: Any, x: Tensor, *arguments: Any, return_weights: Literal[True], **keywords: Any
) -> BlockOutput: ...


def decoder_block_call(self: Any, x: Tensor, *arguments: Any, **keywords: Any) -> Any:
    """`DecoderBlock.forward`, to type checkers."""
    return self(x, *arguments, **keywords)


@overload
def stack_call(
    self: Any,
    x: Tensor,
    source: Tensor | None = None,
    expanding_context: bool | None = None,
    *,
    attention_mask: Tensor | None = None,
    source_mask: Tensor | None = None,
    steps: tuple[Step, ...] | None = None,
    output_attentions: Literal[False] = False,
    output_hidden_states: Literal[False] = False,
) -> Tensor: ...


@overload
def stack_call(
    self: Any, x: Tensor, *arguments: Any, output_attentions: Literal[True], **keywords: Any
) -> StackOutput: ...


@overload
def stack_call(
    self: Any, x: Tensor, *arguments: Any, output_hidden_states: Literal[True], **keywords: Any
) -> StackOutput: ...


def stack_call(self: Any, x: Tensor, *arguments: Any, **keywords: Any) -> Any:
    """`BlockStack.forward`, to type checkers."""
    return self(x, *arguments, **keywords)
