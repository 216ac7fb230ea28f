"""Beam search: the most probable continuations of each row, over several candidates at a time."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import KnownMask, on_device
from ..errors import ArgumentError, NonFiniteError, shown
from .beam_sampling import beam_sampling
from .candidates import Candidates, check_sums
from .choice import Choice
from .decoding import Decoding, checked
from .generated import Generated
from .hypotheses import NOTHING_WRITTEN, Hypotheses, Hypothesis, RowSearch
from .options import GenerationOptions
from .progress import finite_rows, nothing_left
from .prompt import Prompt
from .rows import rows_of
from .stops import Deadline, StopReason


class Found(NamedTuple):
    """Continuations that a search has found."""

    rows: list[list[Hypothesis]]
    """Those of each row of the prompt, best first."""
    dtype: torch.dtype
    """That of their scores."""


def search(rows: Decoding, prompt: Prompt, options: GenerationOptions, *, scored: bool = False) -> Found:
    """The `num_beams` best continuations of each row of the prompt, best first.

    Each step takes `2 * num_beams` candidates of a row, and more where it has several stop tokens, so that `num_beams`
    of them can continue if the others end. `scored`: the continuations have the log probabilities of their tokens.
    """
    deadline = Deadline(options.max_time)
    beams, batch, device = options.num_beams, len(prompt.lengths), prompt.tokens.device
    logits = rows.begin(prompt)
    if beams > logits.shape[-1]:
        raise ArgumentError(
            f"num_beams: expected at most {logits.shape[-1]}, the size of the vocabulary, because the first tokens of "
            f"all candidates differ, got {shown(beams)}"
        )
    given = rows_of(options, prompt)
    sampled = given if given[0].options.temperature else None
    searches = [
        RowSearch(
            row,
            number * beams,
            beams,
            Hypotheses(beams, options.length_penalty, row.limit, options.early_stopping),
            written=[NOTHING_WRITTEN] * beams,
        )
        for number, row in enumerate(given)
    ]
    of_beams = [row for row in given for _ in range(beams)]
    choice = Choice(of_beams, device, [beam_sampling(row.options) for row in of_beams])
    rows.select([row for row in range(batch) for _ in range(beams)])
    logits = logits.repeat_interleave(beams, 0)
    history = prompt.history.repeat_interleave(beams, 0)
    # The candidates of a row are equal at first: all except one get the probability 0.
    totals = torch.full((batch, beams), -math.inf, dtype=logits.dtype, device=device)
    totals[:, 0] = 0.0
    live: KnownMask | None = None
    for step in range(max(row.limit for row in given)):
        if options.processors:
            logits = checked(logits, None if live is None else live.mask, step)
        elif live is not None:
            logits = logits.masked_fill(~live.mask, 0.0)
        scores = choice.scores(history, logits.log_softmax(-1), step, live)
        if options.renormalize_logits:
            # Of a candidate without any token the sum is -inf, and its scores stay -inf.
            scores = scores - scores.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
        sums = (totals.view(-1, 1) + scores).view(batch, -1)
        if options.processors:
            check_sums(sums, step)
        candidates = Candidates.chosen(
            sums,
            max(each.candidates for each in searches),
            step,
            finite=finite_rows(logits),
            sampled=sampled,
            scores=scores if scored else None,
        )
        others = _other_reasons(candidates, options, history, scores, deadline) if _ends_rows(options) else None
        for number, each in enumerate(searches):
            by_others = [None] * len(candidates.values[number]) if others is None else others[number]
            each.step(candidates, number, scores.shape[-1], by_others, sampled is not None)
            if not each.unfinished and not each.finished.best:
                if not options.processors:
                    raise nothing_left([number], step)
                raise NonFiniteError(
                    f"processors: expected at least one finite logit per row, got none in row {number} at step {step}"
                )
        if not any(each.unfinished for each in searches):
            break
        column = on_device([continuation.tokens[-1] for each in searches for continuation in each.written], device)
        kept = [value for each in searches for value, _ in each.kept]
        parents = [parent for each in searches for _, parent in each.kept]
        if parents != list(range(len(parents))):
            rows.select(parents)
            history = history[on_device(parents, device)]
        totals = torch.tensor(kept, dtype=logits.dtype, device="cpu").view(batch, beams).to(device, non_blocking=True)
        live, seen = None, column
        if min(kept) == -math.inf:
            on_host = torch.tensor([[value > -math.inf] for value in kept], device="cpu")
            live = KnownMask(on_host.to(device, non_blocking=True), on_host)
            # A prompt of vectors has no ids to repeat.
            seen = column.where(live.mask.squeeze(-1), history[:, 0] if history.shape[1] else column)
        history = torch.cat((history, seen.unsqueeze(-1)), 1)
        logits = rows.advance(column, live)
    return Found([each.finished.best for each in searches], logits.dtype)


def _ends_rows(options: GenerationOptions) -> bool:
    """True if something else than tokens can end rows."""
    return bool(options.stopping_criteria) or options.max_time is not None


def _other_reasons(
    candidates: Candidates, options: GenerationOptions, history: Tensor, scores: Tensor, deadline: Deadline
) -> list[list[StopReason | None]]:
    """The reasons why candidates of each row end, apart from their tokens."""
    reason: StopReason | None = "time" if deadline.is_over() else None
    if not options.stopping_criteria:
        return [[reason] * len(row) for row in candidates.values]
    ended = candidates.ended(options.stopping_criteria, history, scores)
    return [["criterion" if each else reason for each in row] for row in ended]


def best(
    rows: Decoding, prompt: Prompt, options: GenerationOptions, *, scored: bool
) -> tuple[Tensor | Generated, list[Hypothesis]]:
    """The best continuations that a beam search finds, int64 [rows, N], padded, and each of them as it was found."""
    copies = options.num_return_sequences
    found = search(rows, prompt, options, scored=scored)
    # A tiny vocabulary may give fewer continuations than requested: the last one is then repeated.
    chosen = [hypothesis for row in found.rows for hypothesis in (row + row[-1:] * copies)[:copies]]
    written = [hypothesis.continuation.tokens for hypothesis in chosen]
    width = max(map(len, written))
    padded = [tokens + [options.padding] * (width - len(tokens)) for tokens in written]
    tokens = torch.tensor(padded, device="cpu").to(prompt.tokens.device, non_blocking=True)
    return (Generated.of_beams(tokens, chosen, found.dtype) if scored else tokens), chosen
