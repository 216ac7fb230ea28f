"""Generation in small verbs: all new tokens at once, or one after the other as they come."""

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
    """The new tokens of each row, int64 [B * num_return_sequences, N]; rows that were done earlier are padded.

    Args:
        model: any module whose forward takes `(tokens, attention_mask=...)` and gives logits [B, L, V]; the whole
            models of this library have a `generate` of their own.
        input_ids: int64 [B, L], the prompt, or the new turn of a conversation that is in the model.
        attention_mask: [B, L], true for a real token, where prompts differ in length.
        options: those of `GenerationOptions`, as keywords.

    With caches the conversation goes on in the model: it has then read the prompt and every new token. Raises
    ArgumentError, ShapeError, DtypeError, DeviceError for what cannot work, and NonFiniteError for logits that are not
    finite; the conversation is then as it was before.
    """
    return _generated(model, input_ids, attention_mask, generation_options(options), False)


def generate_whole(
    model: nn.Module | ModelAdapter,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    **options: Unpack[GenerationKeywords],
) -> Tensor:
    """The prompt and the new tokens after it: int64 [B * num_return_sequences, L + N]; else as `generate`."""
    return _generated(model, input_ids, attention_mask, generation_options(options), True)


def _generated(
    model: nn.Module | ModelAdapter,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    with_prompt: bool,
) -> Tensor:
    reader, session, prompt, real, chosen = _begin(model, input_ids, attention_mask, options)

    def work() -> Tensor:
        if chosen.num_beams > 1:
            new = _best(reader, session, prompt, real, chosen)
        else:
            steps = decode(_rows(reader, session, chosen), prompt, real, chosen, keep=session.keeps)
            new = torch.stack(list(steps), 1)
        # All that may fail comes before the conversation moves on: this too.
        new = _ordinary(new)
        if not with_prompt:
            return new
        with torch.inference_mode(False):
            return torch.cat((input_ids.repeat_interleave(new.shape[0] // input_ids.shape[0], 0), new), 1)

    with _without_gradients(reader):
        return session.run(work)


def stream(
    model: nn.Module | ModelAdapter,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    **options: Unpack[GenerationKeywords],
) -> Iterator[Tensor]:
    """The new tokens as they come: int64 [B * num_return_sequences] each. The arguments are those of `generate`.

    It may be left at any point: the conversation has then read the prompt and exactly the tokens that came, or, where
    none came, nothing. What cannot work raises here and now, not at the first token. Several may take turns on one
    model, each with a conversation of its own; where the model's own conversation has been changed by somebody else,
    the next token raises CacheStateError.
    """
    chosen = generation_options(options)
    chosen.check_streams()
    reader, session, prompt, real, chosen = _begin(model, input_ids, attention_mask, chosen)
    steps = decode(_rows(reader, session, chosen), prompt, real, chosen, keep=session.keeps)
    return _stepwise(reader, session, steps)


def _without_gradients(reader: ModelAdapter) -> AbstractContextManager[object]:
    return torch.no_grad() if reader.sharded else torch.inference_mode()


def _stepwise(reader: ModelAdapter, session: Session, steps: Iterator[Tensor]) -> Iterator[Tensor]:
    def work() -> Tensor | None:
        tokens = next(steps, None)
        return None if tokens is None else _ordinary(tokens)

    while True:
        # Entered anew for each step: the mode of this generation is nobody else's in between.
        with _without_gradients(reader):
            tokens = session.run(work)
        if tokens is None:
            return
        yield tokens


def _ordinary(tokens: Tensor) -> Tensor:
    """A copy that is no inference tensor: an embedding that learns may keep a reference of it."""
    with torch.inference_mode(False):
        return tokens.clone()


def _begin(
    model: nn.Module | ModelAdapter, input_ids: Tensor, attention_mask: Tensor | None, options: GenerationOptions
) -> tuple[ModelAdapter, Session, Tensor, Tensor | None, GenerationOptions]:
    reader = model if isinstance(model, ModelAdapter) else ForwardAdapter(model)
    prompt, real = _prompt(input_ids, attention_mask)
    if isinstance(reader, ForwardAdapter):
        reader.check_prompt(prompt, real)
    return reader, _session(reader, prompt, real, options), prompt, real, options


def _session(reader: ModelAdapter, prompt: Tensor, real: Tensor | None, options: GenerationOptions) -> Session:
    lengths = [prompt.shape[1]] * prompt.shape[0] if real is None else real.sum(-1).tolist()
    limits = options.limits(lengths)
    session = reader.session(options.use_cache, max(limits))
    batch = None if session.cache is None or not session.keeps else session.cache.batch
    if batch not in (None, prompt.shape[0]):
        raise ShapeError(
            f"input_ids: expected {batch} rows, as the conversation in the model has, got {prompt.shape[0]}; clear it, "
            "or select its rows"
        )
    reader.check_room(session, lengths, limits)
    return session


def _rows(reader: ModelAdapter, session: Session, options: GenerationOptions) -> Decoding:
    if session.cache is None:
        return UncachedDecoding(reader, session)
    return CachedDecoding(reader, session, session.cache, options.prefill_chunk)


def _best(
    reader: ModelAdapter, session: Session, prompt: Tensor, real: Tensor | None, options: GenerationOptions
) -> Tensor:
    """The best continuations of a beam search; a conversation that goes on then reads what was chosen."""
    batch, copies = prompt.shape[0], options.num_return_sequences
    found = search(_rows(reader, session.fork(), options), prompt, real, options)
    # A tiny vocabulary may have fewer continuations than were asked for: the last one then stands for the rest.
    chosen = [tokens for row in found for _, tokens in (row + row[-1:] * copies)[:copies]]
    best = prompt.new_full((len(chosen), max(map(len, chosen))), options.padding)
    written = torch.zeros_like(best, dtype=torch.bool)
    for row, tokens in enumerate(chosen):
        best[row, : len(tokens)] = torch.tensor(tokens, device=best.device)
        written[row, : len(tokens)] = True
    if session.keeps and session.cache is not None:
        repeated = torch.arange(batch, device="cpu").repeat_interleave(copies)
        session.cache.select(repeated)
        reader.select((repeated * options.num_beams).tolist())
        real = torch.ones_like(prompt, dtype=torch.bool) if real is None else real
        repeated = repeated.to(prompt.device)
        whole, mask = torch.cat((prompt[repeated], best), 1), torch.cat((real[repeated], written), 1)
        _rows(reader, session, options).begin(whole, mask)
    return best


def _prompt(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The prompt int64 [B, L] with its real tokens at the right, and where they are (bool), None where everywhere."""
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
    # Whatever stands at padding is read too: let it be in the vocabulary.
    return input_ids.take_along_dim(order, 1).masked_fill(~real, 0), real
