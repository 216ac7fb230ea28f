"""Types of the options of a generation, and of them all as keywords."""

from collections.abc import Sequence
from typing import Literal, TypedDict

import torch
from torch import nn

from .constraints import AllowedTokens, SequenceBiases
from .prefill import PromptProgress
from .processors import Processor
from .row_options import Criterion, TextDecoder

EarlyStopping = bool | Literal["never"]

UseCache = bool | Literal["auto"]


class GenerationKeywords(TypedDict, total=False):
    """The options of one generation, as keywords; `GenerationOptions` documents them and has the defaults."""

    max_new_tokens: int | Sequence[int] | None
    max_length: int | None
    min_new_tokens: int | None
    max_time: float | None
    temperature: float | Sequence[float]
    top_k: int | Sequence[int | None] | None
    top_p: float | Sequence[float | None] | None
    min_p: float | Sequence[float | None] | None
    typical_p: float | Sequence[float | None] | None
    repetition_penalty: float | Sequence[float | None] | None
    presence_penalty: float | Sequence[float | None] | None
    frequency_penalty: float | Sequence[float | None] | None
    no_repeat_ngram_size: int | Sequence[int | None] | None
    sequence_bias: SequenceBiases | None
    bad_words_ids: Sequence[Sequence[int]]
    prefix_allowed_tokens_fn: AllowedTokens | None
    processors: Sequence[Processor]
    forced_bos_token_id: int | None
    forced_eos_token_id: int | Sequence[int] | None
    stop_tokens: Sequence[int] | Sequence[Sequence[int]]
    stop_sequences: Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]]
    stop_strings: str | Sequence[str] | Sequence[Sequence[str]]
    stop_across_prompt: bool
    tokenizer: TextDecoder | None
    stopping_criteria: Sequence[Criterion]
    pad_token: int | None
    num_beams: int
    length_penalty: float
    early_stopping: EarlyStopping
    renormalize_logits: bool
    num_return_sequences: int
    assistant_model: nn.Module | None
    num_assistant_tokens: int
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int
    bidirectional_prompt: bool
    prefill_chunk_size: int | None
    prompt_progress_callback: PromptProgress | None
    use_cache: UseCache
    seed: int | Sequence[int | None] | None
    generator: torch.Generator | None
