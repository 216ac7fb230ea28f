"""Candidates of a beam search: the best, or sampled, ones of each step, brought to the host in one copy."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import on_device
from ..errors import NonFiniteError
from .choice import waiting_times
from .progress import non_finite
from .row_options import Criterion
from .rows import Row
from .stops import by_criteria


class Candidates(NamedTuple):
    """Candidates of each row, one list a row, in the order in which they count."""

    values: list[list[float]]
    """Summed log probabilities."""
    indices: list[list[int]]
    """Indices in the scores [beams * V] of the row."""
    log_probabilities: list[list[float]]
    """Those of the last tokens; empty lists where they are not asked for."""

    @classmethod
    def chosen(
        cls,
        sums: Tensor,
        count: int,
        step: int,
        *,
        finite: Tensor,
        sampled: Sequence[Row] | None,
        scores: Tensor | None,
    ) -> "Candidates":
        """The best `count` of the sums [B, beams * V] of each row: the one look of a step.

        Args:
            finite: bool [B * beams], false where logits were not finite.
            sampled: the rows, if candidates are sampled without replacement; None: the best ones.
            scores: [B * beams, V], of which the log probabilities are asked for.

        Raises NonFiniteError, with the rows of the prompt and the step, where logits were not finite.
        """
        count = min(count, sums.shape[1])
        if sampled is None:
            values, indices = sums.topk(count)
        else:
            probabilities = sums.softmax(-1)
            # What `multinomial` draws without replacement by.
            indices = (probabilities / waiting_times(sampled, probabilities)).topk(count).indices
            values = sums.gather(1, indices)
        numbers = [values] if scores is None else [values, scores.view(sums.shape).gather(1, indices)]
        # Numbers of one dtype are one copy to the host.
        bits = torch.int64 if sums.dtype == torch.float64 else torch.int32
        columns = indices, finite.view(sums.shape[0], -1).all(-1, keepdim=True), *(each.view(bits) for each in numbers)
        seen = torch.cat([column.long() for column in columns], 1).cpu()
        wrong = [row for row, right in enumerate(seen[:, count].tolist()) if not right]
        if wrong:
            raise non_finite(wrong, step)
        numbers_seen = seen[:, count + 1 :].to(bits).view(sums.dtype)
        return cls(numbers_seen[:, :count].tolist(), seen[:, :count].tolist(), numbers_seen[:, count:].tolist())

    def ended(self, criteria: Sequence[Criterion], history: Tensor, scores: Tensor) -> list[list[bool]]:
        """Whether criteria of the user end each candidate, after the tokens of its beam int64 [B * beams, n]."""
        rows, vocabulary = len(self.indices), scores.shape[-1]
        beams = scores.shape[0] // rows
        parents = [row * beams + index // vocabulary for row in range(rows) for index in self.indices[row]]
        tokens = [index % vocabulary for row in self.indices for index in row]
        parent, column = on_device(parents, history.device), on_device(tokens, history.device)
        flat = iter(by_criteria(criteria, torch.cat((history[parent], column.unsqueeze(-1)), 1), scores[parent]))
        return [[next(flat) for _ in row] for row in self.indices]


def check_sums(sums: Tensor, step: int) -> None:
    """Raises NonFiniteError if a processor gave NaN or +Inf in the candidates' sums [B, beams * V]."""
    wrong = (sums.isnan() | (sums == math.inf)).any(-1).nonzero().flatten().tolist()
    if wrong:
        raise NonFiniteError(
            f"processors: expected logits without NaN and +Inf, got some in rows {wrong} at step {step}"
        )
