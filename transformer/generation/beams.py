"""Beam search: the most probable continuations of each row, over several candidates at a time."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..cache import KnownMask, on_device
from ..errors import ArgumentError, NonFiniteError, shown
from .decoding import Decoding, checked
from .options import GenerationOptions
from .processors import processed
from .progress import finite_rows, non_finite
from .prompt import Prompt


@dataclass(slots=True)
class Hypotheses:
    """The best finished continuations of one row, as (score, tokens), best first."""

    count: int
    length_penalty: float
    max_tokens: int
    best: list[tuple[float, list[int]]] = field(default_factory=list)

    def add(self, log_probability: float, tokens: list[int]) -> None:
        """Adds a finished continuation; its score is its log probability divided by a power of its length."""
        self.best.append((self._score(log_probability, len(tokens)), tokens))
        self.best.sort(key=lambda scored: -scored[0])
        del self.best[self.count :]

    def is_final(self, log_probability: float, length: int) -> bool:
        """True if no continuation of candidates with at most this log probability can improve the best."""
        if len(self.best) < self.count:
            return False
        # Log probabilities only decrease; with a penalty above 0 the score of the longest continuation is the highest.
        best_length = self.max_tokens if self.length_penalty > 0 else length + 1
        return self._score(log_probability, best_length) <= self.best[-1][0]

    def _score(self, log_probability: float, length: int) -> float:
        # The exponent is bounded so that the power is a finite float: math.log of the largest float is about 709.
        bound = 700.0 / math.log(max(length, 2))
        return log_probability / math.pow(length, min(max(self.length_penalty, -bound), bound))


def search(rows: Decoding, prompt: Prompt, options: GenerationOptions) -> list[list[tuple[float, list[int]]]]:
    """The `num_beams` best continuations of each row of the prompt, as (score, tokens), best first.

    A continuation ends with a stop token or sequence, or at its maximum length. Each step takes `2 * num_beams`
    candidates of a row, so that `num_beams` of them can continue if the others end.
    """
    beams, batch, device = options.num_beams, len(prompt.lengths), prompt.tokens.device
    limits, chain = options.limits(prompt.lengths), options.chain()
    finished = [Hypotheses(beams, options.length_penalty, limit) for limit in limits]
    logits = rows.begin(prompt)
    if beams > logits.shape[-1]:
        raise ArgumentError(
            f"num_beams: expected at most {logits.shape[-1]}, the size of the vocabulary, because the first tokens of "
            f"all candidates differ, got {shown(beams)}"
        )
    rows_of_beams = [row for row in range(batch) for _ in range(beams)]
    rows.select(rows_of_beams)
    logits = logits.repeat_interleave(beams, 0)
    history = prompt.history.repeat_interleave(beams, 0)
    written: list[list[int]] = [[] for _ in rows_of_beams]
    # The candidates of a row are equal at first: all except one get the probability 0.
    totals = torch.full((batch, beams), -math.inf, dtype=logits.dtype, device=device)
    totals[:, 0] = 0.0
    live: KnownMask | None = None
    unfinished = [True] * batch
    for step in range(max(limits)):
        if options.processors:
            logits = checked(logits, None if live is None else live.mask, step)
        elif live is not None:
            logits = logits.masked_fill(~live.mask, 0.0)
        scores = processed(chain, history, logits.log_softmax(-1))
        vocabulary = scores.shape[-1]
        candidates = (totals.view(-1, 1) + scores).view(batch, -1)
        if options.processors:
            _check_candidates(candidates, step)
        values, indices = _best(candidates, finite_rows(logits), min(2 * beams, candidates.shape[1]), step)
        parents, tokens, kept = [], [], []
        for row in range(batch):
            continuing: list[tuple[float, int, int]] = []
            for rank, (value, index) in enumerate(zip(values[row], indices[row], strict=True)):
                parent, token = row * beams + index // vocabulary, index % vocabulary
                if value == -math.inf or len(continuing) == beams or not unfinished[row]:
                    break
                continuation = [*written[parent], token]
                if len(continuation) == limits[row]:
                    finished[row].add(value, continuation)
                elif not options.ends(continuation):
                    continuing.append((value, parent, token))
                elif rank < beams:
                    # A candidate that ends at a lower rank is worse than candidates that may still end.
                    finished[row].add(value, continuation)
            if not continuing and not finished[row].best:
                raise NonFiniteError(
                    f"processors: expected at least one finite logit per row, got none in row {row} at step {step}"
                )
            if not continuing or finished[row].is_final(continuing[0][0], len(written[row * beams]) + 1):
                unfinished[row], continuing = False, []
            continuing += [(-math.inf, row * beams, 0)] * (beams - len(continuing))
            for value, parent, token in continuing:
                kept.append(value)
                parents.append(parent)
                tokens.append(token)
        if not any(unfinished):
            break
        written = [[*written[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        column = on_device(tokens, device)
        if parents != list(range(len(parents))):
            rows.select(parents)
            history = history[on_device(parents, device)]
        totals = torch.tensor(kept, dtype=logits.dtype, device="cpu").view(batch, beams).to(device, non_blocking=True)
        live, seen = None, column
        if min(kept) == -math.inf:
            on_host = torch.tensor([[value > -math.inf] for value in kept], device="cpu")
            live = KnownMask(on_host.to(device, non_blocking=True), on_host)
            seen = column.where(live.mask.squeeze(-1), history[:, 0])
        history = torch.cat((history, seen.unsqueeze(-1)), 1)
        logits = rows.advance(column, live)
    return [hypotheses.best for hypotheses in finished]


def _best(candidates: Tensor, finite: Tensor, count: int, step: int) -> tuple[list[list[float]], list[list[int]]]:
    """The best `count` of the candidates [B, beams * V] of each row and their indices: the one look of a step.

    Raises NonFiniteError, with the rows of the prompt and the step, where logits were not `finite` (bool [B * beams]).
    """
    best = candidates.topk(count)
    # Numbers of one dtype are one copy to the host.
    bits = torch.int64 if candidates.dtype == torch.float64 else torch.int32
    columns = best.values.view(bits), best.indices, finite.view(candidates.shape[0], -1).all(-1, keepdim=True)
    seen = torch.cat([column.long() for column in columns], 1).cpu()
    wrong = [row for row, right in enumerate(seen[:, -1].tolist()) if not right]
    if wrong:
        raise non_finite(wrong, step)
    return seen[:, :count].to(bits).view(candidates.dtype).tolist(), seen[:, count : 2 * count].tolist()


def _check_candidates(candidates: Tensor, step: int) -> None:
    """Raises NonFiniteError if a processor gave NaN or +Inf in the candidates' scores [B, beams * V]."""
    wrong = (candidates.isnan() | (candidates == math.inf)).any(-1).nonzero().flatten().tolist()
    if wrong:
        raise NonFiniteError(
            f"processors: expected logits without NaN and +Inf, got some in rows {wrong} at step {step}"
        )
