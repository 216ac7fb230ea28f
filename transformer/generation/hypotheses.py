"""Candidates of one row in a beam search, and its finished continuations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .beam_sampling import candidates_of_beam
from .candidates import Candidates
from .option_types import EarlyStopping
from .rows import Row
from .stops import StopReason, stop_reason


class Continuation(NamedTuple):
    """New tokens of one candidate, and their log probabilities if they are asked for."""

    tokens: list[int]
    log_probabilities: list[float]

    def followed_by(self, token: int, log_probability: float | None) -> "Continuation":
        """The continuation with one more token."""
        more = self.log_probabilities if log_probability is None else [*self.log_probabilities, log_probability]
        return Continuation([*self.tokens, token], more)


NOTHING_WRITTEN = Continuation([], [])


class Hypothesis(NamedTuple):
    """A finished continuation, its score and the reason why it ended."""

    score: float
    continuation: Continuation
    reason: StopReason


@dataclass(slots=True)
class Hypotheses:
    """The best finished continuations of one row, best first."""

    count: int
    length_penalty: float
    max_tokens: int
    early_stopping: EarlyStopping = "never"
    best: list[Hypothesis] = field(default_factory=list)

    def add(self, log_probability: float, continuation: Continuation, reason: StopReason) -> None:
        """Adds a finished continuation; its score is its log probability divided by a power of its length."""
        score = self._score(log_probability, len(continuation.tokens))
        self.best.append(Hypothesis(score, continuation, reason))
        self.best.sort(key=lambda hypothesis: -hypothesis.score)
        del self.best[self.count :]

    def is_final(self, log_probability: float, length: int) -> bool:
        """True if the search ends here, where the best candidate has so many tokens and this log probability."""
        if len(self.best) < self.count:
            return False
        if self.early_stopping is True:
            return True
        # Log probabilities only decrease. With a penalty above 0 the score of the longest continuation is the highest;
        # `early_stopping=False` takes the present length instead.
        best_length = length + 1
        if self.length_penalty > 0:
            best_length = length if self.early_stopping is False else self.max_tokens
        return self._score(log_probability, best_length) <= self.best[-1].score

    def _score(self, log_probability: float, length: int) -> float:
        # The exponent is bounded so that the power is a finite float: math.log of the largest float is about 709.
        bound = 700.0 / math.log(max(length, 2))
        return log_probability / math.pow(length, min(max(self.length_penalty, -bound), bound))


@dataclass(slots=True)
class RowSearch:
    """The candidates of one row of the prompt, and its finished continuations."""

    row: Row
    first: int
    """The number of its first beam among those of all rows."""
    beams: int
    finished: Hypotheses
    unfinished: bool = True
    written: list[Continuation] = field(default_factory=list)
    """The tokens of its beams."""
    kept: list[tuple[float, int]] = field(default_factory=list)
    """The log probability of each beam, -inf where none goes on, and the beam that it continues."""

    @property
    def candidates(self) -> int:
        """How many candidates of a step count."""
        return self.beams * candidates_of_beam(self.row.options)

    def step(
        self, candidates: Candidates, row: int, vocabulary: int, by_others: Sequence[StopReason | None], sampled: bool
    ) -> None:
        """Continues the best candidates of the row, and adds those that end to the finished ones.

        `by_others`: the reason why each candidate ends apart from its tokens.
        """
        values, indices = candidates.values[row], candidates.indices[row]
        log_probabilities = candidates.log_probabilities[row]
        continuing: list[tuple[float, int, Continuation]] = []
        for rank in range(min(self.candidates, len(values)) if self.unfinished else 0):
            if len(continuing) == self.beams and not sampled:
                break
            if values[rank] == -math.inf:
                continue
            beam, token = divmod(indices[rank], vocabulary)
            log_probability = log_probabilities[rank] if log_probabilities else None
            continuation = self.written[beam].followed_by(token, log_probability)
            reason = stop_reason(self.row, continuation.tokens) or by_others[rank]
            if reason is None:
                continuing.append((values[rank], beam, continuation))
            elif rank < self.beams:
                # A candidate that ends at a lower rank is worse than candidates that may still end.
                self.finished.add(values[rank], continuation, reason)
        # Those that are sampled come in the order of their drawing.
        continuing = sorted(continuing, key=lambda each: -each[0])[: self.beams]
        if not continuing or self.finished.is_final(continuing[0][0], len(continuing[0][2].tokens)):
            self.unfinished, continuing = False, []
        continuing += [(-math.inf, 0, NOTHING_WRITTEN.followed_by(0, None))] * (self.beams - len(continuing))
        self.kept = [(value, self.first + beam) for value, beam, _ in continuing]
        self.written = [continuation for _, _, continuation in continuing]
