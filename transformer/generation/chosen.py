"""Next tokens of rows from logits, with marks where there is no choice, as every decode loop needs them."""

from typing import NamedTuple

from torch import Tensor

from ..cache import KnownMask
from .choice import Choice
from .decoding import checked, checked_choice
from .options import GenerationOptions
from .progress import NO_CHOICE, NOTHING_LEFT, finite_rows


class Chosen(NamedTuple):
    """Next tokens of rows."""

    tokens: Tensor
    """int64 [B], ids that the model can read."""
    shown: Tensor
    """The same with `NO_CHOICE` or `NOTHING_LEFT` where there is no choice."""
    scores: Tensor
    """The scores [B, V] that they were chosen from."""


def choose(
    choice: Choice,
    options: GenerationOptions,
    history: Tensor,
    logits: Tensor,
    *,
    new: int | list[int],
    live: KnownMask | None,
    step: int,
    times: Tensor | None = None,
) -> Chosen:
    """The next token of each row by logits [B, V].

    Args:
        history: the tokens of each row so far, int64 [B, n], as processors see them.
        new: how many of them are new, in each row.
        live: bool [B, 1], true for rows that get a token; None: all do.
        step: the step that errors name.
        times: the waiting times to sample by; None: they are drawn.

    Raises NonFiniteError, where there are processors of the user, for logits that are not finite.
    """
    mask = None if live is None else live.mask
    if options.processors:
        # A processor may write in place, and the logits belong to the model.
        logits = checked(logits, mask, step).clone()
    finite = None if options.processors else finite_rows(logits)
    if choice.changes_scores:
        logits = choice.scores(history, logits, new, live)
    if options.processors:
        logits = checked_choice(logits, mask, step)
    tokens = shown = choice.take(logits, times)
    if choice.excludes_tokens and not options.processors:
        shown = shown.where(logits.amax(-1).isfinite(), NOTHING_LEFT)
    if finite is not None:
        shown = shown.where(finite, NO_CHOICE)
    return Chosen(tokens, shown, logits)
