"""Guesses of the next tokens of rows, for speculative decoding: by a smaller model, or by what a row repeats."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import KnownMask
from ..errors import ArgumentError
from .choice import Choice
from .decoding import CachedDecoding
from .draws import Draws
from .prompt import Prompt
from .rows import Row


class Request(NamedTuple):
    """What guesses are asked for."""

    written: Sequence[Sequence[int]]
    """The new tokens of each row so far."""
    counts: Sequence[int]
    """The most guesses that each row needs; 0: none."""
    history: Tensor | None
    """The tokens of each row so far, int64 [B, n], as processors see them; None if no processor needs them."""


class Guesses(NamedTuple):
    """Guessed tokens int64 [B, K], and how many of each row's are guesses, which are the first."""

    tokens: Tensor
    counts: Sequence[int]


class Guesser(ABC):
    """Interface of a source of guesses."""

    @abstractmethod
    def begin(self, prompt: Prompt, copies: int) -> None:
        """Reads the prompt, of which each row becomes so many rows."""

    @abstractmethod
    def guess(self, request: Request) -> Guesses:
        """Guesses of the tokens that follow in each row."""


class _NotFinalError(Exception):
    """Ends a transaction of tokens that are forgotten."""


class AssistantGuesser(Guesser):
    """Guesses by a smaller model of the same vocabulary, with the options and the random numbers of the rows.

    The assistant's caches have the tokens that are final. Its own guesses are read after them and then forgotten, so
    that what has become final is read once more with the next token: a few tokens cost it as much as one.
    """

    def __init__(self, rows: CachedDecoding, choice: Choice, draws: Draws, like: Tensor) -> None:
        """`like`: logits [B, V] of the model that checks the guesses."""
        self._rows = rows
        self._choice = choice
        self._draws = draws
        self._like = like
        self._known = [0] * like.shape[0]
        """New tokens of each row that the caches have."""

    def begin(self, prompt: Prompt, copies: int) -> None:
        logits = self._rows.begin(prompt)
        if logits.shape[-1] != self._like.shape[-1]:
            raise ArgumentError(
                f"assistant_model: expected the vocabulary of the model, {self._like.shape[-1]} tokens, "
                f"got one of {logits.shape[-1]}"
            )
        self._rows.repeat(len(prompt.lengths), copies)

    def guess(self, request: Request) -> Guesses:
        written, counts, history = request
        most, device = max(counts), self._like.device
        if not most:
            return Guesses(torch.empty(len(counts), 0, dtype=torch.int64, device=device), counts)
        each = zip(written, self._known, counts, strict=True)
        unread = [list(tokens[known:]) if count else [] for tokens, known, count in each]
        width = max(map(len, unread))
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in unread], device="cpu")
        mask = KnownMask.unless_all_real([[False] * (width - len(row)) + [True] * len(row) for row in unread], device)
        logits = self._rows.read(tokens.to(device, non_blocking=True), mask, True)
        self._known = [known + len(row) for known, row in zip(self._known, unread, strict=True)]
        guessed: list[Tensor] = []
        places = [len(row) for row in written]
        with suppress(_NotFinalError), self._rows.cache.transaction():
            for number in range(most):
                live = KnownMask.unless_all_real([[number < count] for count in counts], device)
                if number:
                    logits = self._rows.advance(guessed[-1], live)
                guessed.append(self._choose(logits.to(self._like.dtype), history, guessed, places, number, live))
            raise _NotFinalError
        return Guesses(torch.stack(guessed, 1), counts)

    def _choose(
        self,
        logits: Tensor,
        history: Tensor | None,
        guessed: Sequence[Tensor],
        places: Sequence[int],
        number: int,
        live: KnownMask | None,
    ) -> Tensor:
        new = [place + number for place in places]
        if history is not None and self._choice.changes_scores:
            tokens = torch.cat((history, torch.stack(list(guessed), 1)), 1) if guessed else history
            logits = self._choice.scores(tokens, logits, new, live)
        return self._choice.take(logits, self._draws.times(new, logits))


def without_callables(rows: Sequence[Row]) -> list[Row]:
    """The rows as they are guessed: without callables of the user, which may count their calls, or know no way on from
    tokens that are guessed after an end."""
    return [replace(row, options=replace(row.options, processors=(), prefix_allowed_tokens_fn=None)) for row in rows]


class LookupGuesser(Guesser):
    """Guesses by repetition: what followed the last tokens of a row where they stood in the row before.

    The longest sequence of at most `max_ngram` tokens counts, and its latest place. What follows it may be the guess
    itself, so that a repetition of few tokens is continued too. Rows are their prompts of this call and their new
    tokens, as in transformers.
    """

    def __init__(self, max_ngram: int, device: torch.device) -> None:
        self._max_ngram = max_ngram
        self._device = device
        self._tokens: list[list[int]] = []
        self._prompts: list[int] = []
        self._after: list[dict[tuple[int, ...], int]] = []
        """The place after the latest occurrence of each sequence that has a token after it."""

    def begin(self, prompt: Prompt, copies: int) -> None:
        rows = zip(prompt.tokens.tolist(), prompt.lengths, strict=True)
        for tokens, length in rows:
            for _ in range(copies):
                self._tokens.append([])
                self._after.append({})
                # A prompt of vectors has no ids.
                given = tokens[max(len(tokens) - length, 0) :]
                self._prompts.append(len(given))
                self._append(len(self._tokens) - 1, given)

    def guess(self, request: Request) -> Guesses:
        found = []
        for row, (written, count) in enumerate(zip(request.written, request.counts, strict=True)):
            own = self._tokens[row]
            self._append(row, written[len(own) - self._prompts[row] :])
            place = self._place(row) if count else None
            guess: list[int] = []
            if place is not None:
                period = len(own) - place
                for number in range(count):
                    guess.append(own[place + number] if number < period else guess[number - period])
            found.append(guess)
        most = max(map(len, found))
        tokens = torch.tensor([each + [0] * (most - len(each)) for each in found], dtype=torch.int64, device="cpu")
        return Guesses(tokens.view(len(found), most).to(self._device, non_blocking=True), list(map(len, found)))

    def _append(self, row: int, tokens: Sequence[int]) -> None:
        own, after = self._tokens[row], self._after[row]
        for token in tokens:
            # The sequences that end before this token are followed from now on.
            for length in range(1, min(self._max_ngram, len(own)) + 1):
                after[tuple(own[-length:])] = len(own)
            own.append(token)

    def _place(self, row: int) -> int | None:
        own, after = self._tokens[row], self._after[row]
        for length in range(min(self._max_ngram, len(own)), 0, -1):
            place = after.get(tuple(own[-length:]))
            if place is not None:
                return place
        return None
