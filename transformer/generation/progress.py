"""Progress of the rows of one generation, as the host knows it: which of them go on, and at which step they ended."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import KnownMask
from ..errors import NonFiniteError
from .rows import Row
from .stops import StopReason, stop_reason

NO_CHOICE = -1
"""Id that stands for a token whose logits were not finite, until the host looks."""
NOTHING_LEFT = -2
"""Id that stands for a token where options have excluded all, until the host looks."""


class Progress:
    """The rows of one generation.

    Args:
        rows: the rows, with their options for an end and their limits.
        device: the device of the model's inputs.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self._rows = rows
        self._device = device
        self.has_stops = any(row.options.has_stops for row in rows)
        """True if the tokens of a step decide which rows go on."""
        self._written: list[list[int]] = [[] for _ in rows]
        self.reasons: list[StopReason | None] = [None] * len(rows)
        """The reason why each row has ended; None: no reason is known but its limit."""
        self._shortest = min(row.limit for row in rows)
        self._any_ended = False
        self._latest: tuple[list[bool], KnownMask | None] = [], None

    def goes_on(self, step: int) -> bool:
        """True if a row gets a token at this step, as far as the host has looked."""
        if step < self._shortest and not self._any_ended:
            return True
        return any(self._live(step))

    def live(self, step: int) -> KnownMask | None:
        """bool [B, 1], true for the rows that get a token at this step; None: all rows do."""
        if step < self._shortest and not self._any_ended:
            return None
        rows = self._live(step)
        # One tensor as long as no row ends, so that it is copied to the device once.
        if rows != self._latest[0]:
            on_host = torch.tensor(rows, device="cpu").unsqueeze(-1)
            self._latest = rows, KnownMask(on_host.to(self._device, non_blocking=True), on_host)
        return self._latest[1]

    def add(self, first: int, columns: Sequence[Sequence[int]]) -> None:
        """Takes note of the ids that rows got at the steps from `first` on, one column [B] a step.

        Raises NonFiniteError, with the rows and the step, where one of them is `NO_CHOICE` or `NOTHING_LEFT`.
        """
        for step, column in enumerate(columns, first):
            for no_token, error in ((NO_CHOICE, non_finite), (NOTHING_LEFT, nothing_left)):
                if no_token in column:
                    raise error([row for row, token in enumerate(column) if token == no_token], step)
            if self.has_stops:
                self._look_for_ends(step, column)

    def end(self, rows: Sequence[bool], reason: StopReason, step: int) -> None:
        """Ends these of the rows after this step, except those that have ended, or reached their limit."""
        for row, (ends, live) in enumerate(zip(rows, self._live(step), strict=True)):
            if ends and live and step + 1 < self._rows[row].limit:
                self.reasons[row] = reason
                self._any_ended = True

    def _live(self, step: int) -> list[bool]:
        return [reason is None and step < row.limit for reason, row in zip(self.reasons, self._rows, strict=True)]

    def _look_for_ends(self, step: int, column: Sequence[int]) -> None:
        for row, live in enumerate(self._live(step)):
            if live:
                self._written[row].append(column[row])
                self.reasons[row] = stop_reason(self._rows[row], self._written[row])
                self._any_ended |= self.reasons[row] is not None


def finite_rows(logits: Tensor) -> Tensor:
    """bool [B], true for the rows of logits [B, V] in which all numbers are finite; the host does not look."""
    # Two operations: `aminmax` of 49,152 numbers takes 80 times as long on the CPU (495 us).
    least, most = logits.amin(-1), logits.amax(-1)
    # The difference of a number that is not finite with itself is NaN, which equals nothing.
    return (least - least) == (most - most)


def non_finite(rows: Sequence[int], step: int) -> NonFiniteError:
    """The error for logits of these rows."""
    return NonFiniteError(
        f"logits: expected finite numbers, got NaN or Inf in rows {list(rows)} at step {step}; look for them in the "
        "weights, or use a wider dtype"
    )


def nothing_left(rows: Sequence[int], step: int) -> NonFiniteError:
    """The error for rows in which options exclude all tokens."""
    return NonFiniteError(
        "no_repeat_ngram_size, bad_words_ids, sequence_bias, prefix_allowed_tokens_fn, min_new_tokens: expected at "
        f"least one token that they do not exclude, got none in rows {list(rows)} at step {step}"
    )
