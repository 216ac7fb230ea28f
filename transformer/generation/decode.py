"""Decode loop: one token of each row per step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .choice import Choice, log_probabilities
from .chosen import choose
from .decoding import Decoding
from .generated import Record
from .options import GenerationOptions
from .progress import Progress
from .prompt import Prompt
from .rows import rows_of
from .stops import Deadline, by_criteria

STEPS_UNSEEN = 16
"""Steps after which the host looks at tokens where no option needs them earlier: at most so many steps follow one whose
logits are not finite, before the error."""


def decode(
    rows: Decoding,
    prompt: Prompt,
    options: GenerationOptions,
    *,
    keep: bool,
    streams: bool,
    record: Record | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of each row, int64 [B * num_return_sequences], until all rows are finished.

    The host looks at the tokens of each step, or, where nothing depends on them, of `STEPS_UNSEEN` steps at once, and
    always before it yields them. With `streams=True` it looks at each step; with `keep=True` too the caches contain,
    when a token is yielded, all tokens up to this token and no others. A `record` takes note of the tokens' scores.
    """
    deadline = Deadline(options.max_time)
    logits = rows.begin(prompt)
    each = rows_of(options, prompt)
    copies, device = options.num_return_sequences, prompt.tokens.device
    rows.repeat(len(prompt.lengths), copies)
    if copies > 1:
        logits, prompt = logits.repeat_interleave(copies, 0), prompt.repeated(copies)
    choice, progress, criteria = Choice(each, device), Progress(each, device), options.stopping_criteria
    length, most, padding = prompt.tokens.shape[1], max(row.limit for row in each), options.padding
    has_history = choice.changes_scores or bool(criteria)
    history = prompt.history if has_history else prompt.tokens
    of_user = bool(criteria or options.processors or options.prefix_allowed_tokens_fn)
    looks_always = streams or of_user or progress.has_stops
    unseen = 1 if looks_always else STEPS_UNSEEN
    taken: list[Tensor] = []
    for step in range(most):
        live = progress.live(step)
        mask = None if live is None else live.mask
        seen = history[:, : length + step]
        tokens, shown, logits = choose(choice, options, seen, logits, new=step, live=live, step=step)
        row_is_live = None if mask is None else mask.squeeze(-1)
        if record is not None:
            column = log_probabilities(logits, tokens)
            record.log_probabilities.append(column if row_is_live is None else column.where(row_is_live, 0.0))
        if has_history:
            if history.shape[1] == length + step:
                # Twice as many columns, and one of a prompt of vectors, which has no ids.
                history = torch.cat((history, history.new_zeros(history.shape[0], max(length + step, 1))), 1)
            # A finished row gets no new id, so that processors see only tokens of the row.
            history[:, length + step] = tokens if row_is_live is None else tokens.where(row_is_live, history[:, 0])
        taken.append(shown if row_is_live is None else shown.where(row_is_live, padding))
        time_is_over = options.max_time is not None and deadline.is_over()
        looks = time_is_over or len(taken) == unseen or step + 1 == most
        if looks:
            progress.add(step + 1 - len(taken), torch.stack(taken).tolist())
        if criteria:
            progress.end(by_criteria(criteria, history[:, : length + step + 1], logits), "criterion", step)
        if time_is_over:
            progress.end([True] * len(each), "time", step)
        goes_on = progress.goes_on(step + 1)
        if keep or goes_on:
            logits = rows.advance(tokens, live)
        if record is not None:
            record.stop_reasons = progress.reasons
        if looks:
            yield from taken
            taken = []
        if not goes_on:
            return
