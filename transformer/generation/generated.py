"""Result of a generation with the scores of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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
    accepted: list[int] | None = None

    def of_rows(
        self, log_probabilities: Sequence[Sequence[float]], reasons: Sequence[StopReason | None], like: Tensor
    ) -> None:
        """Takes note of all tokens of rows that have different numbers of them; logits `like` [B, V]."""
        most = max(map(len, log_probabilities))
        padded = [[*row, *[0.0] * (most - len(row))] for row in log_probabilities]
        columns = torch.tensor(padded, dtype=like.dtype, device="cpu").to(like.device, non_blocking=True)
        self.log_probabilities, self.stop_reasons = list(columns.unbind(1)), reasons

    def generated(self, tokens: Tensor) -> Generated:
        """The result, with tokens as they are returned."""
        columns = torch.stack(self.log_probabilities, 1)
        reasons: list[StopReason] = [reason or "length" for reason in self.stop_reasons]
        return Generated(tokens, columns, None, reasons, self.accepted)


def tokens_of(result: Tensor | Generated) -> Tensor:
    """The tokens of a result, with scores or without."""
    return result.tokens if isinstance(result, Generated) else result


def returned(result: Tensor | Generated, before: Tensor | None) -> Tensor | Generated:
    """The result of a call, without inference tensors, with the tokens `before` it [B, L]."""
    if isinstance(result, Generated):
        scores = result.beam_scores if result.beam_scores is None else without_inference_mode(result.beam_scores)
        tokens = tokens_of(returned(result.tokens, before))
        log_probabilities = without_inference_mode(result.log_probabilities)
        return replace(result, tokens=tokens, log_probabilities=log_probabilities, beam_scores=scores)
    new = without_inference_mode(result)
    if before is None:
        return new
    with torch.inference_mode(False):
        return torch.cat((before.repeat_interleave(new.shape[0] // before.shape[0], 0), new), 1)


def without_inference_mode(tensor: Tensor) -> Tensor:
    """A copy that is not an inference tensor, because autograd may save it in a later call of an embedding."""
    with torch.inference_mode(False):
        return tensor.clone()
