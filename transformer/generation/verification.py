"""Verification of guesses: the tokens that plain decoding would have chosen, from logits after each guessed token."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import KnownMask
from .choice import Choice, log_probabilities
from .chosen import choose
from .draws import Draws
from .guesses import Guesses
from .options import GenerationOptions
from .progress import NO_CHOICE, NOTHING_LEFT, finite_rows, non_finite, nothing_left
from .rows import Row
from .stops import StopReason, by_criteria, stop_reason


@dataclass(slots=True)
class SpeculativeRow:
    """One row of a speculative decoding, as the host knows it."""

    row: Row
    past: int
    """Tokens in the caches before the first new one."""
    written: list[int] = field(default_factory=list)
    """Its new tokens."""
    guessed: list[bool] = field(default_factory=list)
    """For each of them, whether it was guessed right."""
    log_probabilities: list[float] = field(default_factory=list)
    read: int = 0
    """New tokens that are in the caches."""
    reason: StopReason | None = None
    """The reason why it has ended."""

    def add(self, token: int, guess: int | None, log_probability: float | None) -> bool:
        """Takes note of a token; true if it was guessed, and the row goes on with the token after it.

        Raises NonFiniteError for marks of no choice.
        """
        for no_token, error in ((NO_CHOICE, non_finite), (NOTHING_LEFT, nothing_left)):
            if token == no_token:
                raise error([self.row.number], len(self.written))
        self.written.append(token)
        self.guessed.append(token == guess)
        self.read += token == guess
        if log_probability is not None:
            self.log_probabilities.append(log_probability)
        self.reason = stop_reason(self.row, self.written)
        return token == guess and self.reason is None

    def token(self, place: int, padding: int) -> int:
        """Its new token at this place, or padding after its end."""
        return self.written[place] if place < len(self.written) else padding


class Column(NamedTuple):
    """A token of each row on the host, or a mark of no choice, and its log probability if rows take note of it."""

    tokens: Sequence[int]
    scores: Sequence[float | None]


class Verifier:
    """Choice of the tokens of rows by the logits after their last tokens and after each guess.

    Args:
        choice, draws: how tokens are chosen.
        options: those of the generation.
        scored: whether rows take note of log probabilities.
        in_step: whether a wrong guess of one row ends the turn of all, so that the rows that go on have equally many
            new tokens, and callables of the user get the calls of plain decoding.
    """

    def __init__(
        self, choice: Choice, draws: Draws, options: GenerationOptions, *, scored: bool, in_step: bool
    ) -> None:
        self._choice = choice
        self._draws = draws
        self._options = options
        self._scored = scored
        self._in_step = in_step
        self.has_history = choice.changes_scores or bool(options.stopping_criteria)
        """True if it needs the tokens so far."""

    def verify(
        self,
        rows: Sequence[SpeculativeRow],
        going: Sequence[bool],
        logits: Tensor,
        guesses: Guesses,
        history: Tensor | None,
    ) -> None:
        """Adds to each row that is `going` the tokens up to the first that was not guessed.

        Args:
            logits: [B, 1 + K, V], after the last token of each row, and after each of its guesses.
            guesses: K or fewer for each row.
            history: the tokens of each row so far, int64 [B, n], as processors see them; None unless `has_history`.

        Raises NonFiniteError for logits that are not finite, unless a wrong guess is before them.
        """
        guessed, at_once = guesses.tokens.tolist(), self._most_probable(logits) if history is None else []
        if history is not None:
            history = torch.cat((history, guesses.tokens), 1)
        for number in range(logits.shape[1]):
            if not any(going):
                return
            guess, took = _guess(guessed, guesses.counts, number), going
            if history is None:
                going = _added(rows, going, at_once[number], guess)
            else:
                seen = history[:, : history.shape[1] - guesses.tokens.shape[1] + number]
                going = self._chosen(rows, going, logits[:, number], seen, guess)
            if self._in_step and any(
                row.reason is None for row, was, goes in zip(rows, took, going, strict=True) if was and not goes
            ):
                for row, goes in zip(rows, going, strict=True):
                    # The last token of such a row is read once more, with those of the others.
                    row.read -= goes
                return

    def _chosen(
        self,
        rows: Sequence[SpeculativeRow],
        going: Sequence[bool],
        logits: Tensor,
        seen: Tensor,
        guess: Sequence[int | None],
    ) -> list[bool]:
        """Adds a token by logits [B, V] to each row that is `going`; true for those that go on after it."""
        live = KnownMask.unless_all_real([[goes] for goes in going], logits.device)
        new = [len(row.written) for row in rows]
        step = max(count for count, goes in zip(new, going, strict=True) if goes)
        times = self._draws.times(new, logits)
        chosen = choose(self._choice, self._options, seen, logits, new=new, live=live, step=step, times=times)
        scores = log_probabilities(chosen.scores, chosen.tokens).tolist() if self._scored else [None] * len(rows)
        goes_on = _added(rows, going, Column(chosen.shown.tolist(), scores), guess)
        criteria = self._options.stopping_criteria
        if criteria:
            seen = torch.cat((seen, chosen.tokens.unsqueeze(1)), 1)
            ended = by_criteria(criteria, seen, chosen.scores)
            for place, row in enumerate(rows):
                if going[place] and ended[place] and row.reason is None:
                    row.reason, goes_on[place] = "criterion", False
        return goes_on

    def _most_probable(self, logits: Tensor) -> list[Column]:
        """The columns where each token is the most probable one, so that the host looks once."""
        tokens = logits.argmax(-1)
        shown = tokens.where(finite_rows(logits), NO_CHOICE).T.tolist()
        if not self._scored:
            return [Column(column, [None] * len(column)) for column in shown]
        return list(map(Column, shown, log_probabilities(logits, tokens).T.tolist()))


def aligned_history(prompt: Tensor, written: Sequence[Sequence[int]]) -> Tensor:
    """The tokens of each row so far, the new ones last: int64 [B, n], from the history [B, L] of the prompts.

    Shorter rows have their first token before the prompt.
    """
    most = max(map(len, written))
    new = torch.tensor([[*row, *[0] * (most - len(row))] for row in written], dtype=torch.int64, device="cpu")
    tokens = torch.cat((prompt, new.view(len(written), most).to(prompt.device, non_blocking=True)), 1)
    missing = torch.tensor([[most - len(row)] for row in written], device="cpu")
    if not missing.any():
        return tokens
    columns = torch.arange(tokens.shape[1], device="cpu") - missing
    return tokens.gather(1, columns.clamp(min=0).to(prompt.device, non_blocking=True))


def _guess(guessed: Sequence[Sequence[int]], counts: Sequence[int], number: int) -> list[int | None]:
    return [own[number] if number < count else None for own, count in zip(guessed, counts, strict=True)]


def _added(
    rows: Sequence[SpeculativeRow], going: Sequence[bool], column: Column, guess: Sequence[int | None]
) -> list[bool]:
    """Adds its token to each row that is `going`; true for those whose guess it was, and that go on after it."""
    each = zip(rows, going, column.tokens, guess, column.scores, strict=True)
    return [goes and row.add(token, own, score) for row, goes, token, own, score in each]
