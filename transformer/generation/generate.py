"""Functions of generation: all new tokens in one tensor, or a stream of tokens."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..cache import KnownMask
from ..errors import ArgumentError, CacheStateError, ShapeError, shown
from .assistant import assistant_of, check_can_speculate
from .beams import best
from .decoding import CachedDecoding, Decoding, UncachedDecoding
from .generated import Generated, returned, tokens_of, without_inference_mode
from .keywords import generation_options
from .model_adapter import ForwardAdapter, ModelAdapter
from .option_types import GenerationKeywords
from .options import GenerationOptions
from .prompt import Prompt
from .session import Session
from .shared_by_ranks import check_ranks
from .steps import steps_of, without_gradients, written


@overload
def generate(
    model: nn.Module | ModelAdapter,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    return_scores: Literal[False] = False,
    **options: Unpack[GenerationKeywords],
) -> Tensor: ...


@overload
def generate(
    model: nn.Module | ModelAdapter,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    return_scores: Literal[True],
    **options: Unpack[GenerationKeywords],
) -> Generated: ...


def generate(
    model: nn.Module | ModelAdapter,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    return_scores: bool = False,
    **options: Unpack[GenerationKeywords],
) -> Tensor | Generated:
    """The new tokens of each row, int64 [B * num_return_sequences, N]; rows that finish earlier are padded.

    Args:
        model: a module whose forward takes `(tokens, attention_mask=...)` and gives logits [B, L, V]. The models of
            this library also have a method `generate`.
        input_ids: int64 [B, L], the prompt, or the new turn of a conversation in the model's caches.
        attention_mask: [B, L], true for a real token; needed if prompts differ in length.
        inputs_embeds: [B, L, E], vectors in place of `input_ids`, where the module's forward takes `inputs_embeds`;
            processors see new tokens only.
        return_scores: True gives a `Generated`: the tokens, their log probabilities and why each row ended.
        options: the options of `GenerationOptions`, as keywords.

    With caches, the model's conversation then contains the prompt and all new tokens. Raises ArgumentError, ShapeError,
    DtypeError or DeviceError for invalid arguments, and NonFiniteError for logits that are not finite; the conversation
    is then as it was before.
    """
    given = {"inputs_embeds": inputs_embeds}
    return run_generate(model, input_ids, attention_mask, options, **given, return_scores=return_scores)


def generate_whole(
    model: nn.Module | ModelAdapter,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    **options: Unpack[GenerationKeywords],
) -> Tensor:
    """The prompt followed by the new tokens, int64 [B * num_return_sequences, L + N]; else as `generate`."""
    return tokens_of(run_generate(model, input_ids, attention_mask, options, before=input_ids))


def run_generate(
    model: nn.Module | ModelAdapter,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    keywords: GenerationKeywords,
    *,
    inputs_embeds: Tensor | None = None,
    before: Tensor | None = None,
    return_scores: bool = False,
) -> Tensor | Generated:
    """As `generate`, for the methods of models. `before`: tokens [B, L] in front of the new ones in the result."""
    options = generation_options(keywords)
    if not isinstance(return_scores, bool):
        raise ArgumentError(f"return_scores: expected True or False, got {shown(return_scores)}")
    adapter, session, prompt, assistant = _begin(model, input_ids, attention_mask, options, inputs_embeds)

    def work() -> Tensor | Generated:
        if options.num_beams > 1:
            result = _beam_search(adapter, session, prompt, options, return_scores)
        else:
            rows = _rows(adapter, session, options)
            keep = session.continues_conversation
            result = written(rows, prompt, options, keep=keep, scored=return_scores, assistant=assistant)
        # Everything that can fail comes before the conversation is published.
        return returned(result, before)

    with without_gradients(adapter, assistant):
        return session.run(work)


def stream(
    model: nn.Module | ModelAdapter,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    **options: Unpack[GenerationKeywords],
) -> Iterator[Tensor]:
    """An iterator over the new tokens: int64 [B * num_return_sequences] per step. Arguments as in `generate`.

    The iterator can be abandoned at any point. The conversation then contains the prompt and the tokens that were
    yielded, or nothing if none was yielded. Invalid arguments raise at the call, not at the first token. Several
    streams can alternate on one model if each has its own conversation. If other code changes the model's own
    conversation, the next token raises CacheStateError.
    """
    chosen = generation_options(options)
    chosen.check_streams()
    adapter, session, prompt, assistant = _begin(model, input_ids, attention_mask, chosen, inputs_embeds)
    rows = _rows(adapter, session, chosen)
    steps = steps_of(rows, prompt, chosen, assistant, keep=session.continues_conversation, streams=True)
    return _stepwise(partial(without_gradients, adapter, assistant), session, steps)


def _stepwise(
    mode: Callable[[], AbstractContextManager[object]], session: Session, steps: Iterator[Tensor]
) -> Iterator[Tensor]:
    def work() -> Tensor | None:
        tokens = next(steps, None)
        return None if tokens is None else without_inference_mode(tokens)

    while True:
        # Entered again for each step, so that the mode does not leak to the caller's code between two steps.
        with mode():
            tokens = session.run(work)
        if tokens is None:
            return
        yield tokens


def _begin(
    model: nn.Module | ModelAdapter,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    inputs_embeds: Tensor | None,
) -> tuple[ModelAdapter, Session, Prompt, CachedDecoding | None]:
    adapter = model if isinstance(model, ModelAdapter) else ForwardAdapter(model)
    prompt = Prompt.of(input_ids, attention_mask, inputs_embeds)
    if isinstance(adapter, ForwardAdapter):
        adapter.check_prompt(prompt.inputs, None if prompt.mask is None else prompt.mask.mask)
    if adapter.sharded:
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        check_ranks(adapter.modules(), given, options)
    session = _session(adapter, prompt, options)
    if options.speculates:
        check_can_speculate(adapter, session, options)
    return adapter, session, prompt, assistant_of(prompt, options)


def _session(adapter: ModelAdapter, prompt: Prompt, options: GenerationOptions) -> Session:
    limits, rows = options.limits(prompt.lengths), len(prompt.lengths)
    session = adapter.session(options.use_cache, max(limits))
    batch = None if session.cache is None or not session.continues_conversation else session.cache.batch
    if batch not in (None, rows):
        raise ShapeError(
            f"input_ids: expected {batch} rows, as the conversation in the model has, got {rows}; clear the "
            "cache, or select its rows"
        )
    if options.bidirectional_prompt and batch is not None and session.cache is not None and session.cache.lengths.any():
        raise CacheStateError(
            "bidirectional_prompt: expected a prompt that begins the conversation, got one after "
            f"{session.cache.lengths.tolist()} tokens in the model's caches; clear them"
        )
    adapter.check_room(session, prompt.lengths, limits)
    return session


def _rows(adapter: ModelAdapter, session: Session, options: GenerationOptions) -> Decoding:
    if session.cache is None:
        return UncachedDecoding(adapter, session, options)
    return CachedDecoding(adapter, session, session.cache, options)


def _beam_search(
    adapter: ModelAdapter, session: Session, prompt: Prompt, options: GenerationOptions, scored: bool
) -> Tensor | Generated:
    """The best continuations of a beam search; the model's own conversation then reads them."""
    copies, device = options.num_return_sequences, prompt.tokens.device
    result, chosen = best(_rows(adapter, session.fork(), options), prompt, options, scored=scored)
    if session.continues_conversation and session.cache is not None:
        tokens, rows_written = tokens_of(result), [hypothesis.continuation.tokens for hypothesis in chosen]
        batch, rows = len(prompt.lengths), CachedDecoding(adapter, session, session.cache, options)
        adapter.select([row * options.num_beams for row in range(batch)])
        # The prompt once for all continuations of its row.
        rows.read_prompt(prompt)
        rows.repeat(batch, copies)
        width = tokens.shape[1]
        real = torch.tensor([[column < len(each) for column in range(width)] for each in rows_written], device="cpu")
        mask = KnownMask(real.to(device, non_blocking=True), real)
        rows.read_prompt(Prompt(tokens, mask, list(map(len, rows_written))), continues=True)
    return result
