"""Decode loop: one token of each row per step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .decoding import Decoding, checked, checked_choice
from .options import GenerationOptions
from .processors import processed
from .progress import NO_CHOICE, Progress, finite_rows
from .prompt import Prompt

STEPS_UNSEEN = 16
"""Steps after which the host looks at tokens where no option needs them earlier: at most so many steps follow one whose
logits are not finite, before the error."""


def decode(
    rows: Decoding, prompt: Prompt, options: GenerationOptions, *, keep: bool, streams: bool
) -> Iterator[Tensor]:
    """Yields the next token of each row, int64 [B * num_return_sequences], until all rows are finished.

    The host looks at the tokens of each step, or, where nothing depends on them, of `STEPS_UNSEEN` steps at once, and
    always before it yields them. With `streams=True` it looks at each step; with `keep=True` too the caches contain,
    when a token is yielded, all tokens up to this token and no others.
    """
    logits = rows.begin(prompt)
    copies = options.num_return_sequences
    if copies > 1:
        rows.select([row for row in range(len(prompt.lengths)) for _ in range(copies)])
        logits, prompt = logits.repeat_interleave(copies, 0), prompt.repeated(copies)
    limits, chain, length = options.limits(prompt.lengths), options.chain(), prompt.tokens.shape[1]
    progress = Progress(options, limits, prompt.tokens.device)
    history = prompt.history if chain else prompt.tokens
    unseen = 1 if streams or options.needs_tokens else STEPS_UNSEEN
    taken: list[Tensor] = []
    for step in range(max(limits)):
        live = progress.live(step)
        mask = None if live is None else live.mask
        if options.processors:
            # A processor may write in place, and the logits belong to the model.
            logits = checked(logits, mask, step).clone()
        finite = None if options.processors else finite_rows(logits)
        if chain:
            logits = processed(chain, history[:, : length + step], logits)
        if options.processors:
            logits = checked_choice(logits, mask, step)
        tokens = options.take(logits)
        row_is_live = None if mask is None else mask.squeeze(-1)
        if chain:
            if history.shape[1] == length + step:
                history = torch.cat((history, torch.zeros_like(history)), 1)
            # A finished row gets no new id, so that processors see only tokens of the row.
            history[:, length + step] = tokens if row_is_live is None else tokens.where(row_is_live, history[:, 0])
        shown = tokens if finite is None else tokens.where(finite, NO_CHOICE)
        taken.append(shown if row_is_live is None else shown.where(row_is_live, options.padding))
        looks = len(taken) == unseen or step + 1 == max(limits)
        if looks:
            progress.add(step + 1 - len(taken), torch.stack(taken).tolist())
        goes_on = progress.goes_on(step + 1)
        if keep or goes_on:
            logits = rows.advance(tokens, live)
        if looks:
            yield from taken
            taken = []
        if not goes_on:
            return
