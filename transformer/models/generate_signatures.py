"""Signatures of `generate` for type checkers: the tokens, and a `Generated` where a call asks for scores."""

from typing import Any, Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from ..generation import Generated, GenerationKeywords


@overload
def decoder_only_generate(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    return_scores: Literal[False] = False,
    **options: Unpack[GenerationKeywords],
) -> Tensor: ...


@overload
def decoder_only_generate(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    return_scores: Literal[True],
    **options: Unpack[GenerationKeywords],
) -> Generated: ...


def decoder_only_generate(self: Any, *arguments: Any, **keywords: Any) -> Any:
    """`DecoderOnlyTransformer.generate`, to type checkers."""
    return self.generate(*arguments, **keywords)


@overload
def encoder_decoder_generate(
    self: Any,
    source_ids: Tensor | None = None,
    source_mask: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    target_ids: Tensor | None = None,
    target_mask: Tensor | None = None,
    return_scores: Literal[False] = False,
    **options: Unpack[GenerationKeywords],
) -> Tensor: ...


@overload
def encoder_decoder_generate(
    self: Any,
    source_ids: Tensor | None = None,
    source_mask: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    target_ids: Tensor | None = None,
    target_mask: Tensor | None = None,
    return_scores: Literal[True],
    **options: Unpack[GenerationKeywords],
) -> Generated: ...


def encoder_decoder_generate(self: Any, *arguments: Any, **keywords: Any) -> Any:
    """`EncoderDecoderTransformer.generate`, to type checkers."""
    return self.generate(*arguments, **keywords)


@overload
def umt5_generate(
    self: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    decoder_input_ids: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    return_scores: Literal[False] = False,
    **options: Unpack[GenerationKeywords],
) -> Tensor: ...


@overload
def umt5_generate(
    self: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    decoder_input_ids: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    return_scores: Literal[True],
    **options: Unpack[GenerationKeywords],
) -> Generated: ...


def umt5_generate(self: Any, *arguments: Any, **keywords: Any) -> Any:
    """`UMT5Model.generate`, to type checkers."""
    return self.generate(*arguments, **keywords)
