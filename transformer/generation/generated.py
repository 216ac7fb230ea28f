"""Result of a generation with the scores of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .hypotheses import Hypothesis
from .stops import StopReason


@dataclass(frozen=True, eq=False)
class Generated:
    """Tokens of a generation, and what the model thought of them: the result with `return_scores=True`.

    Args:
        tokens: int64 [rows, ...], as without `return_scores`.
        log_probabilities: [rows, N], of each new token after processors and options; 0 at padding. Those of a beam
            search are the ones that were summed: divided by a power of the length, the sum is the candidate's score.
        beam_scores: [rows], the scores of a beam search; None without beams.
        stop_reasons: the reason why each row ended: "stop_token", "stop_sequence", "stop_string", "criterion", "time"
            or "length".
        accepted: how many tokens of each row were guessed right; None without speculative decoding.
    """

    tokens: Tensor
    log_probabilities: Tensor
    beam_scores: Tensor | None
    stop_reasons: list[StopReason]
    accepted: list[int] | None = None

    @classmethod
    def of_beams(cls, tokens: Tensor, best: Sequence[Hypothesis], dtype: torch.dtype) -> "Generated":
        """The result of a beam search, with the tokens [rows, N] of its best continuations."""
        width = tokens.shape[1]
        rows = [each.continuation.log_probabilities for each in best]
        padded = torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=dtype, device="cpu")
        scores = torch.tensor([each.score for each in best], dtype=dtype, device="cpu")
        padded, scores = (each.to(tokens.device, non_blocking=True) for each in (padded, scores))
        return cls(tokens, padded, scores, [each.reason for each in best])


@dataclass(slots=True)
class Record:
    """What a loop takes note of for a `Generated`, token by token."""

    log_probabilities: list[Tensor] = field(default_factory=list)
    """One column [rows] a step."""
    stop_reasons: Sequence[StopReason | None] = ()
    """None: the row reached its limit."""

    def generated(self, tokens: Tensor) -> Generated:
        """The result, with tokens as they are returned."""
        columns = torch.stack(self.log_probabilities, 1)
        return Generated(tokens, columns, None, [reason or "length" for reason in self.stop_reasons])


def tokens_of(result: Tensor | Generated) -> Tensor:
    """The tokens of a result, with scores or without."""
    return result.tokens if isinstance(result, Generated) else result
