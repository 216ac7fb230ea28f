"""Functions of generation: all new tokens in one tensor, or a stream of tokens."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..cache import KnownMask
from ..errors import ShapeError
from .beams import search
from .decode import decode
from .decoding import CachedDecoding, Decoding, UncachedDecoding
from .keywords import generation_options
from .model_adapter import ForwardAdapter, ModelAdapter
from .options import GenerationKeywords, GenerationOptions
from .prompt import Prompt
from .session import Session


def generate(
    model: nn.Module | ModelAdapter,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    **options: Unpack[GenerationKeywords],
) -> Tensor:
    """The new tokens of each row, int64 [B * num_return_sequences, N]; rows that finish earlier are padded.

    Args:
        model: a module whose forward takes `(tokens, attention_mask=...)` and gives logits [B, L, V]. The models of
            this library also have a method `generate`.
        input_ids: int64 [B, L], the prompt, or the new turn of a conversation in the model's caches.
        attention_mask: [B, L], true for a real token; needed if prompts differ in length.
        options: the options of `GenerationOptions`, as keywords.

    With caches, the model's conversation then contains the prompt and all new tokens. Raises ArgumentError, ShapeError,
    DtypeError or DeviceError for invalid arguments, and NonFiniteError for logits that are not finite; the conversation
    is then as it was before.
    """
    return _generated(model, input_ids, attention_mask, generation_options(options), False)


def generate_whole(
    model: nn.Module | ModelAdapter,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    **options: Unpack[GenerationKeywords],
) -> Tensor:
    """The prompt followed by the new tokens, int64 [B * num_return_sequences, L + N]; else as `generate`."""
    return _generated(model, input_ids, attention_mask, generation_options(options), True)


def _generated(
    model: nn.Module | ModelAdapter,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    with_prompt: bool,
) -> Tensor:
    adapter, session, prompt = _begin(model, input_ids, attention_mask, options)

    def work() -> Tensor:
        if options.num_beams > 1:
            new = _beam_search(adapter, session, prompt, options)
        else:
            new = torch.stack(list(_steps(adapter, session, prompt, options, streams=False)), 1)
        # Everything that can fail comes before the conversation is published.
        new = _without_inference_mode(new)
        if not with_prompt:
            return new
        with torch.inference_mode(False):
            return torch.cat((input_ids.repeat_interleave(new.shape[0] // input_ids.shape[0], 0), new), 1)

    with _without_gradients(adapter):
        return session.run(work)


def stream(
    model: nn.Module | ModelAdapter,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
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
    adapter, session, prompt = _begin(model, input_ids, attention_mask, chosen)
    return _stepwise(adapter, session, _steps(adapter, session, prompt, chosen, streams=True))


def _without_gradients(adapter: ModelAdapter) -> AbstractContextManager[object]:
    return torch.no_grad() if adapter.sharded else torch.inference_mode()


def _stepwise(adapter: ModelAdapter, session: Session, steps: Iterator[Tensor]) -> Iterator[Tensor]:
    def work() -> Tensor | None:
        tokens = next(steps, None)
        return None if tokens is None else _without_inference_mode(tokens)

    while True:
        # Entered again for each step, so that the mode does not leak to the caller's code between two steps.
        with _without_gradients(adapter):
            tokens = session.run(work)
        if tokens is None:
            return
        yield tokens


def _without_inference_mode(tokens: Tensor) -> Tensor:
    """A copy that is not an inference tensor, because autograd may save it in a later call of an embedding."""
    with torch.inference_mode(False):
        return tokens.clone()


def _begin(
    model: nn.Module | ModelAdapter, input_ids: Tensor, attention_mask: Tensor | None, options: GenerationOptions
) -> tuple[ModelAdapter, Session, Prompt]:
    adapter = model if isinstance(model, ModelAdapter) else ForwardAdapter(model)
    prompt = Prompt.of(input_ids, attention_mask)
    if isinstance(adapter, ForwardAdapter):
        adapter.check_prompt(prompt.tokens, None if prompt.mask is None else prompt.mask.mask)
    return adapter, _session(adapter, prompt, options), prompt


def _session(adapter: ModelAdapter, prompt: Prompt, options: GenerationOptions) -> Session:
    limits, rows = options.limits(prompt.lengths), len(prompt.lengths)
    session = adapter.session(options.use_cache, max(limits))
    batch = None if session.cache is None or not session.continues_conversation else session.cache.batch
    if batch not in (None, rows):
        raise ShapeError(
            f"input_ids: expected {batch} rows, as the conversation in the model has, got {rows}; clear the "
            "cache, or select its rows"
        )
    adapter.check_room(session, prompt.lengths, limits)
    return session


def _rows(adapter: ModelAdapter, session: Session, options: GenerationOptions) -> Decoding:
    if session.cache is None:
        return UncachedDecoding(adapter, session)
    return CachedDecoding(adapter, session, session.cache, options.prefill_chunk)


def _steps(
    adapter: ModelAdapter, session: Session, prompt: Prompt, options: GenerationOptions, *, streams: bool
) -> Iterator[Tensor]:
    rows = _rows(adapter, session, options)
    return decode(rows, prompt, options, keep=session.continues_conversation, streams=streams)


def _beam_search(adapter: ModelAdapter, session: Session, prompt: Prompt, options: GenerationOptions) -> Tensor:
    """The best continuations of a beam search; the model's own conversation then reads them."""
    copies, device = options.num_return_sequences, prompt.tokens.device
    found = search(_rows(adapter, session.fork(), options), prompt, options)
    # A tiny vocabulary may give fewer continuations than requested: the last one is then repeated.
    chosen = [tokens for row in found for _, tokens in (row + row[-1:] * copies)[:copies]]
    width = max(map(len, chosen))
    padded = [tokens + [options.padding] * (width - len(tokens)) for tokens in chosen]
    best = torch.tensor(padded, device="cpu").to(device, non_blocking=True)
    if session.continues_conversation and session.cache is not None:
        batch, rows = len(prompt.lengths), _rows(adapter, session, options)
        adapter.select([row * options.num_beams for row in range(batch)])
        # The prompt once for all continuations of its row.
        rows.begin(prompt)
        if copies > 1:
            rows.select([row for row in range(batch) for _ in range(copies)])
        written = torch.tensor([[column < len(tokens) for column in range(width)] for tokens in chosen], device="cpu")
        mask = KnownMask(written.to(device, non_blocking=True), written)
        rows.begin(Prompt(best, mask, list(map(len, chosen))))
    return best
