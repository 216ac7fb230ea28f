"""Beam search: the likeliest whole continuations, over several candidates per row side by side."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ArgumentError, NonFiniteError
from .decoding import Decoding, checked
from .options import GenerationOptions
from .processors import processed, shown, tokens_so_far


@dataclass(slots=True)
class Hypotheses:
    """The best continuations of one row that are done, as (score, tokens), best first."""

    count: int
    length_penalty: float
    most_tokens: int
    best: list[tuple[float, list[int]]] = field(default_factory=list)

    def add(self, log_probability: float, tokens: list[int]) -> None:
        """A continuation that is done: its score is its log probability over a power of its length."""
        self.best.append((self._score(log_probability, len(tokens)), tokens))
        self.best.sort(key=lambda scored: -scored[0])
        del self.best[self.count :]

    def closed_to(self, log_probability: float, length: int) -> bool:
        """Whether nothing that goes on from candidates of at most this log probability can get among the best."""
        if len(self.best) < self.count:
            return False
        # Log probabilities only fall; with a penalty above 0 the longest continuation is scored most mildly.
        most = self.most_tokens if self.length_penalty > 0 else length + 1
        return self._score(log_probability, most) <= self.best[-1][0]

    def _score(self, log_probability: float, length: int) -> float:
        # Kept within what a float can hold, whatever the penalty.
        most = 700.0 / math.log(max(length, 2))
        return log_probability / math.pow(length, min(max(self.length_penalty, -most), most))


def search(
    rows: Decoding, prompt: Tensor, real: Tensor | None, options: GenerationOptions
) -> list[list[tuple[float, list[int]]]]:
    """For each row of `prompt` int64 [B, L] its `num_beams` best continuations, as (score, tokens), best first.

    A continuation ends with a stop token or sequence, or at the limit of its length. Each step looks at twice
    `num_beams` candidates of a row, so that `num_beams` of them can go on whatever ends.
    """
    beams, (batch, length), device = options.num_beams, prompt.shape, prompt.device
    lengths = [length] * batch if real is None else real.sum(-1).tolist()
    limits, chain = options.limits(lengths), options.chain()
    done = [Hypotheses(beams, options.length_penalty, limit) for limit in limits]
    logits = rows.begin(prompt, real)
    logits = checked(logits, None, 0)
    if beams > logits.shape[-1]:
        raise ArgumentError(
            f"num_beams: expected at most {logits.shape[-1]}, the tokens of the vocabulary, got {shown(beams)}; "
            "no more candidates can differ in their first token"
        )
    spread = [row for row in range(batch) for _ in range(beams)]
    rows.select(spread)
    logits = logits.repeat_interleave(beams, 0)
    history = tokens_so_far(prompt, real).repeat_interleave(beams, 0)
    written: list[list[int]] = [[] for _ in spread]
    # The candidates of a row are one and the same at first: all but one stand back.
    totals = torch.full((batch, beams), -math.inf, dtype=logits.dtype, device=device)
    totals[:, 0] = 0.0
    open_rows = [True] * batch
    for step in range(max(limits)):
        scores = processed(chain, history, logits.log_softmax(-1))
        vocabulary = scores.shape[-1]
        candidates = (totals.view(-1, 1) + scores).view(batch, -1)
        if options.processors:
            _check_candidates(candidates, step)
        best = candidates.topk(min(2 * beams, candidates.shape[1]))
        values, places = best.values.tolist(), best.indices.tolist()
        parents, tokens, kept = [], [], []
        for row in range(batch):
            going_on: list[tuple[float, int, int]] = []
            for rank, (value, place) in enumerate(zip(values[row], places[row], strict=True)):
                parent, token = row * beams + place // vocabulary, place % vocabulary
                if value == -math.inf or len(going_on) == beams or not open_rows[row]:
                    break
                continuation = [*written[parent], token]
                if len(continuation) == limits[row]:
                    done[row].add(value, continuation)
                elif not options.ends(continuation):
                    going_on.append((value, parent, token))
                elif rank < beams:
                    # What ends further down the list is worse than candidates that may still end.
                    done[row].add(value, continuation)
            if not going_on and not done[row].best:
                raise NonFiniteError(
                    f"processors: expected logits of which one at least is finite, got none in row {row} at step {step}"
                )
            if not going_on or done[row].closed_to(going_on[0][0], len(written[row * beams]) + 1):
                open_rows[row], going_on = False, []
            going_on += [(-math.inf, row * beams, 0)] * (beams - len(going_on))
            for value, parent, token in going_on:
                kept.append(value)
                parents.append(parent)
                tokens.append(token)
        if not any(open_rows):
            break
        if parents != list(range(len(parents))):
            rows.select(parents)
        written = [[*written[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        column = torch.tensor(tokens, device=device)
        history = torch.cat((history[torch.tensor(parents, device=device)], column.unsqueeze(-1)), 1)
        totals = torch.tensor(kept, dtype=logits.dtype, device=device).view(batch, beams)
        live = None if min(kept) > -math.inf else (totals > -math.inf).flatten()
        logits = checked(rows.advance(column, live), live, step + 1)
    return [hypotheses.best for hypotheses in done]


def _check_candidates(candidates: Tensor, step: int) -> None:
    """Raises NonFiniteError where a processor made NaN or +Inf of the scores of a row's candidates [B, beams * V]."""
    wrong = (candidates.isnan() | (candidates == math.inf)).any(-1).nonzero().flatten().tolist()
    if wrong:
        raise NonFiniteError(
            f"processors: expected logits without NaN and +Inf, got some in rows {wrong} at step {step}"
        )
