"""Speculative decoding: several tokens of each row per step of the model, where a cheaper source guesses them.

Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192). Guesses are
checked by the choice that plain decoding makes with the same random numbers, so the tokens are those of plain decoding.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..cache import KnownMask, KVCache, on_device
from ..cache.state import SelfAttentionState
from ..errors import ArgumentError
from .choice import Choice
from .decoding import CachedDecoding
from .draws import Draws
from .generated import Record
from .guesses import AssistantGuesser, Guesser, Guesses, LookupGuesser, Request, without_callables
from .options import GenerationOptions
from .prompt import Prompt
from .row_options import UNLIMITED_TOKENS
from .rows import rows_of
from .stops import Deadline
from .verification import SpeculativeRow, Verifier, aligned_history

MOST_AHEAD = 32
"""Tokens by which a sampled row may be ahead of another one, because their random numbers [B, V] a token are kept."""


def speculate(
    rows: CachedDecoding,
    assistant: CachedDecoding | None,
    prompt: Prompt,
    options: GenerationOptions,
    *,
    keep: bool,
    streams: bool,
    record: Record | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of each row, int64 [B * num_return_sequences], as `decode` does.

    `assistant`: the model that guesses; None: what rows repeat is the guess. With `streams=True` and `keep=True` the
    session publishes, when a token is yielded, the conversation up to this token.
    """
    deadline, copies, device = Deadline(options.max_time), options.num_return_sequences, prompt.tokens.device
    logits = rows.begin(prompt)
    given = rows_of(options, prompt)
    rows.repeat(len(prompt.lengths), copies)
    if copies > 1:
        logits = logits.repeat_interleave(copies, 0)
    choice, draws = Choice(given, device), Draws(given)
    guesser: Guesser = LookupGuesser(options.max_matching_ngram_size, device)
    if assistant is not None:
        guesser = AssistantGuesser(assistant, Choice(without_callables(given), device), draws, logits)
    guesser.begin(prompt, copies)
    check_rows(rows.cache)
    window, most = smallest_window(rows.cache), options.most_guesses
    # `truncate` reaches back to before a call of no more tokens than a window has, and a stream that is kept may be
    # abandoned at any of its tokens. Callables of the user may count their calls.
    in_step = bool(options.processors or options.stopping_criteria) or (streams and keep and window is not None)
    if window is not None:
        most = min(most, window - 1)
    verifier = Verifier(choice, draws, options, scored=record is not None, in_step=in_step)
    of_prompt = prompt.repeated(copies).history if verifier.has_history else None
    each = [SpeculativeRow(row, past) for row, past in zip(given, rows.cache.lengths.tolist(), strict=True)]
    most_ahead = MOST_AHEAD if draws.are_needed else UNLIMITED_TOKENS
    nothing = Guesses(torch.empty(len(each), 0, dtype=torch.int64, device=device), [0] * len(each))
    guesses, reads, columns, history, yielded = nothing, [True] * len(each), logits.unsqueeze(1), of_prompt, 0
    while True:
        going = [reading and row.reason is None for row, reading in zip(each, reads, strict=True)]
        cached = [row.read + count for row, count in zip(each, guesses.counts, strict=True)]
        verifier.verify(each, going, columns, guesses, history)
        if options.max_time is not None and deadline.is_over():
            for row in each:
                row.reason = row.reason or "time"
        if cached != [row.read for row in each]:
            rows.cache.truncate([row.past + row.read for row in each])
        ends_at = [len(row.written) for row in each]
        unread = [row.reason is None or (keep and row.read < end) for row, end in zip(each, ends_at, strict=True)]
        complete = [row.read if keep else len(row.written) for row, more in zip(each, unread, strict=True) if more]
        known = min(complete, default=max(ends_at))
        for column in range(yielded, known):
            if streams and keep:
                rows.session.shown = [row.past + min(column + 1, end) for row, end in zip(each, ends_at, strict=True)]
            yield on_device([row.token(column, options.padding) for row in each], device)
        yielded = known
        if not any(unread):
            break
        slowest = min(end for end, more in zip(ends_at, unread, strict=True) if more)
        draws.forget(slowest)
        reads = [more and end - slowest <= most_ahead for end, more in zip(ends_at, unread, strict=True)]
        counts = [
            min(most, row.row.limit - len(row.written) - 1) if reading and row.reason is None else 0
            for row, reading in zip(each, reads, strict=True)
        ]
        written = [row.written for row in each]
        history = None if of_prompt is None else aligned_history(of_prompt, written)
        guesses = guesser.guess(Request(written, counts, history)) if any(counts) else nothing
        columns = _read(rows, each, reads, guesses)
    if record is not None:
        record.of_rows([row.log_probabilities for row in each], [row.reason for row in each], logits)
        record.accepted = [sum(row.guessed) for row in each]


def check_rows(cache: KVCache) -> None:
    """Raises ArgumentError for several rows of a sequence that ranks share."""
    states = [part.contents.state for part in cache.parts()]
    shared = any(isinstance(state, SelfAttentionState) and state.part is not None for state in states)
    if shared and (cache.batch or 1) > 1:
        raise ArgumentError(
            "assistant_model, prompt_lookup_num_tokens: expected one row in a sequence that ranks share, since rows "
            f"accept different numbers of tokens, got {cache.batch}; give one after the other"
        )


def smallest_window(cache: KVCache) -> int | None:
    """The window of the layer with the smallest one, as far as calls have slid; None if no layer slides."""
    states = (part.contents.state for part in cache.parts())
    return min((state.window for state in states if state is not None and state.window is not None), default=None)


def _read(rows: CachedDecoding, each: Sequence[SpeculativeRow], reads: Sequence[bool], guesses: Guesses) -> Tensor:
    """Logits [B, 1 + K, V] after the last token, and after the guesses, of each row that `reads`."""
    device = guesses.tokens.device
    tokens = torch.cat((on_device([row.written[-1] for row in each], device).unsqueeze(1), guesses.tokens), 1)
    widths = [1 + count if reading else 0 for count, reading in zip(guesses.counts, reads, strict=True)]
    mask = KnownMask.unless_all_real(
        [[column < width for column in range(tokens.shape[1])] for width in widths], device
    )
    for row, reading in zip(each, reads, strict=True):
        if reading:
            row.read = len(row.written)
    return rows.read_each(tokens, mask)
