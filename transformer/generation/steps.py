"""Steps of a generation: one token at a time, or by guesses that the model checks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .decode import decode
from .decoding import CachedDecoding, Decoding
from .generated import Generated, Record
from .model_adapter import ModelAdapter
from .options import GenerationOptions
from .prompt import Prompt
from .speculative import speculate


def without_gradients(adapter: ModelAdapter, assistant: CachedDecoding | None = None) -> AbstractContextManager[object]:
    """The mode in which a generation calls the model, and an assistant that guesses for it."""
    sharded = adapter.sharded or (assistant is not None and assistant.adapter.sharded)
    return torch.no_grad() if sharded else torch.inference_mode()


def steps_of(
    rows: Decoding,
    prompt: Prompt,
    options: GenerationOptions,
    assistant: CachedDecoding | None = None,
    *,
    keep: bool,
    streams: bool,
    record: Record | None = None,
) -> Iterator[Tensor]:
    """The tokens of each step: one at a time, or by guesses that the model checks."""
    if options.speculates and isinstance(rows, CachedDecoding):
        return speculate(rows, assistant, prompt, options, keep=keep, streams=streams, record=record)
    return decode(rows, prompt, options, keep=keep, streams=streams, record=record)


def written(
    rows: Decoding,
    prompt: Prompt,
    options: GenerationOptions,
    assistant: CachedDecoding | None = None,
    *,
    keep: bool,
    scored: bool,
) -> Tensor | Generated:
    """The new tokens of each row, int64 [rows, N], without beams; `scored`: a `Generated`. See `decode` for `keep`."""
    record = Record() if scored else None
    steps = steps_of(rows, prompt, options, assistant, keep=keep, streams=False, record=record)
    tokens = torch.stack(list(steps), 1)
    return tokens if record is None else record.generated(tokens)
