"""Functions of generation: all new tokens in one tensor, or a stream of tokens."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..attention import real_in_every_row
from ..errors import ArgumentError, DtypeError, ShapeError
from .beams import search
from .decode import decode
from .decoding import CachedDecoding, Decoding, UncachedDecoding
from .keywords import generation_options
from .model_adapter import ForwardAdapter, ModelAdapter
from .options import GenerationKeywords, GenerationOptions
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
    adapter, session, prompt, real, chosen = _begin(model, input_ids, attention_mask, options)

    def work() -> Tensor:
        if chosen.num_beams > 1:
            new = _beam_search(adapter, session, prompt, real, chosen)
        else:
            steps = decode(_rows(adapter, session, chosen), prompt, real, chosen, keep=session.continues_conversation)
            new = torch.stack(list(steps), 1)
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
    adapter, session, prompt, real, chosen = _begin(model, input_ids, attention_mask, chosen)
    steps = decode(_rows(adapter, session, chosen), prompt, real, chosen, keep=session.continues_conversation)
    return _stepwise(adapter, session, steps)


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
) -> tuple[ModelAdapter, Session, Tensor, Tensor | None, GenerationOptions]:
    adapter = model if isinstance(model, ModelAdapter) else ForwardAdapter(model)
    prompt, real = _prompt(input_ids, attention_mask)
    if isinstance(adapter, ForwardAdapter):
        adapter.check_prompt(prompt, real)
    return adapter, _session(adapter, prompt, real, options), prompt, real, options


def _session(adapter: ModelAdapter, prompt: Tensor, real: Tensor | None, options: GenerationOptions) -> Session:
    lengths = [prompt.shape[1]] * prompt.shape[0] if real is None else real.sum(-1).tolist()
    limits = options.limits(lengths)
    session = adapter.session(options.use_cache, max(limits))
    batch = None if session.cache is None or not session.continues_conversation else session.cache.batch
    if batch not in (None, prompt.shape[0]):
        raise ShapeError(
            f"input_ids: expected {batch} rows, as the conversation in the model has, got {prompt.shape[0]}; clear the "
            "cache, or select its rows"
        )
    adapter.check_room(session, lengths, limits)
    return session


def _rows(adapter: ModelAdapter, session: Session, options: GenerationOptions) -> Decoding:
    if session.cache is None:
        return UncachedDecoding(adapter, session)
    return CachedDecoding(adapter, session, session.cache, options.prefill_chunk)


def _beam_search(
    adapter: ModelAdapter, session: Session, prompt: Tensor, real: Tensor | None, options: GenerationOptions
) -> Tensor:
    """The best continuations of a beam search; the model's own conversation then reads them."""
    batch, copies = prompt.shape[0], options.num_return_sequences
    found = search(_rows(adapter, session.fork(), options), prompt, real, options)
    # A tiny vocabulary may give fewer continuations than requested: the last one is then repeated.
    chosen = [tokens for row in found for _, tokens in (row + row[-1:] * copies)[:copies]]
    best = prompt.new_full((len(chosen), max(map(len, chosen))), options.padding)
    written = torch.zeros_like(best, dtype=torch.bool)
    for row, tokens in enumerate(chosen):
        best[row, : len(tokens)] = torch.tensor(tokens, device=best.device)
        written[row, : len(tokens)] = True
    if session.continues_conversation and session.cache is not None:
        repeated = torch.arange(batch, device="cpu").repeat_interleave(copies)
        session.cache.select(repeated)
        adapter.select((repeated * options.num_beams).tolist())
        real = torch.ones_like(prompt, dtype=torch.bool) if real is None else real
        repeated = repeated.to(prompt.device)
        whole, mask = torch.cat((prompt[repeated], best), 1), torch.cat((real[repeated], written), 1)
        _rows(adapter, session, options).begin(whole, mask)
    return best


def _prompt(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The prompt int64 [B, L] with its padding moved to the left, and its mask (bool; None: no padding)."""
    if not isinstance(input_ids, Tensor):
        raise ArgumentError(
            f"input_ids: expected a tensor int64 [B, L], got {type(input_ids).__name__}; give torch.as_tensor(ids)"
        )
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ShapeError(f"input_ids: expected [B, L] with at least one row and one token, got {list(input_ids.shape)}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"input_ids: expected int64 token ids, got {input_ids.dtype}")
    input_ids = input_ids.long()
    batch, length = input_ids.shape
    real = real_in_every_row("attention_mask", attention_mask, batch, length, input_ids.device)
    if real is None or bool(real.all()):
        return input_ids, None
    order = real.to(torch.uint8).argsort(dim=-1, stable=True)
    real = real.take_along_dim(order, 1)
    # The model embeds padding too, so its ids must be in the vocabulary.
    return input_ids.take_along_dim(order, 1).masked_fill(~real, 0), real
