"""Signatures of whole models for type checkers: a tensor, and a `ModelOutput` where a call asks for more.

The second overloads leave the other arguments open, so that those are written once.
"""

from typing import Any, Literal, overload

from torch import Tensor

from .outputs import ModelOutput


@overload
def decoder_only_call(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    expanding_context: bool | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    segment_ids: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: None = None,
    logits_to_keep: int = 0,
    output_attentions: Literal[False] | None = None,
    output_hidden_states: Literal[False] | None = None,
    **unused: None,
) -> Tensor: ...


@overload
def decoder_only_call(self: Any, *arguments: Any, labels: Tensor, **keywords: Any) -> ModelOutput: ...


@overload
def decoder_only_call(self: Any, *arguments: Any, output_attentions: Literal[True], **keywords: Any) -> ModelOutput: ...


@overload
def decoder_only_call(
    self: Any, *arguments: Any, output_hidden_states: Literal[True], **keywords: Any
) -> ModelOutput: ...


def decoder_only_call(self: Any, *arguments: Any, **keywords: Any) -> Any:
    """`DecoderOnlyTransformer.forward`, to type checkers."""
    return self(*arguments, **keywords)


@overload
def encoder_call(
    self: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    *,
    segment_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    output_attentions: Literal[False] | None = None,
    output_hidden_states: Literal[False] | None = None,
    **unused: None,
) -> Tensor: ...


@overload
def encoder_call(
    self: Any, input_ids: Tensor, *arguments: Any, output_attentions: Literal[True], **keywords: Any
) -> ModelOutput: ...


@overload
def encoder_call(
    self: Any, input_ids: Tensor, *arguments: Any, output_hidden_states: Literal[True], **keywords: Any
) -> ModelOutput: ...


def encoder_call(self: Any, *arguments: Any, **keywords: Any) -> Any:
    """`EncoderTransformer.forward`, to type checkers."""
    return self(*arguments, **keywords)


@overload
def classifier_call(
    self: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    *,
    labels: None = None,
    output_attentions: Literal[False] | None = None,
    output_hidden_states: Literal[False] | None = None,
    **unused: None,
) -> Tensor: ...


@overload
def classifier_call(self: Any, input_ids: Tensor, *arguments: Any, labels: Tensor, **keywords: Any) -> ModelOutput: ...


@overload
def classifier_call(
    self: Any, input_ids: Tensor, *arguments: Any, output_attentions: Literal[True], **keywords: Any
) -> ModelOutput: ...


@overload
def classifier_call(
    self: Any, input_ids: Tensor, *arguments: Any, output_hidden_states: Literal[True], **keywords: Any
) -> ModelOutput: ...


def classifier_call(self: Any, *arguments: Any, **keywords: Any) -> Any:
    """`EncoderClassifier.forward`, to type checkers."""
    return self(*arguments, **keywords)


@overload
def encoder_decoder_call(
    self: Any,
    source_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    source_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    encoder_hidden_states: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    labels: None = None,
    logits_to_keep: int = 0,
    output_attentions: Literal[False] | None = None,
    output_hidden_states: Literal[False] | None = None,
    **unused: None,
) -> Tensor: ...


@overload
def encoder_decoder_call(self: Any, *arguments: Any, labels: Tensor, **keywords: Any) -> ModelOutput: ...


@overload
def encoder_decoder_call(
    self: Any, *arguments: Any, output_attentions: Literal[True], **keywords: Any
) -> ModelOutput: ...


@overload
def encoder_decoder_call(
    self: Any, *arguments: Any, output_hidden_states: Literal[True], **keywords: Any
) -> ModelOutput: ...


def encoder_decoder_call(self: Any, *arguments: Any, **keywords: Any) -> Any:
    """`EncoderDecoderTransformer.forward`, to type checkers."""
    return self(*arguments, **keywords)


@overload
def umt5_call(
    self: Any,
    input_ids: Tensor,
    decoder_input_ids: Tensor,
    attention_mask: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    *,
    labels: None = None,
    logits_to_keep: int = 0,
    output_attentions: Literal[False] | None = None,
    output_hidden_states: Literal[False] | None = None,
) -> Tensor: ...


@overload
def umt5_call(self: Any, *arguments: Any, labels: Tensor, **keywords: Any) -> ModelOutput: ...


@overload
def umt5_call(self: Any, *arguments: Any, output_attentions: Literal[True], **keywords: Any) -> ModelOutput: ...


@overload
def umt5_call(self: Any, *arguments: Any, output_hidden_states: Literal[True], **keywords: Any) -> ModelOutput: ...


def umt5_call(self: Any, *arguments: Any, **keywords: Any) -> Any:
    """`UMT5Model.forward`, to type checkers."""
    return self(*arguments, **keywords)
