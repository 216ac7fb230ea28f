"""Progress of the rows of one generation, as the host knows it: which of them go on, and at which step they ended."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import KnownMask
from ..errors import NonFiniteError
from .options import GenerationOptions

NO_CHOICE = -1
"""Id that stands for a token whose logits were not finite, until the host looks."""


class Progress:
    """The rows of one generation.

    Args:
        options: the options, of which those for the end of a row count.
        limits: maximum number of new tokens of each row.
        device: the device of the model's inputs.
    """

    def __init__(self, options: GenerationOptions, limits: Sequence[int], device: torch.device) -> None:
        self._options = options
        self._limits = limits
        self._device = device
        self._stops = bool(options.stop_tokens or options.stop_sequences)
        self._written: list[list[int]] = [[] for _ in limits]
        self._ended = [False] * len(limits)
        self._shortest = min(limits)
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

        Raises NonFiniteError, with the rows and the step, where one of them is `NO_CHOICE`.
        """
        for step, column in enumerate(columns, first):
            if NO_CHOICE in column:
                raise non_finite([row for row, token in enumerate(column) if token == NO_CHOICE], step)
            if self._stops:
                self._look_for_ends(step, column)

    def _live(self, step: int) -> list[bool]:
        return [not ended and step < limit for ended, limit in zip(self._ended, self._limits, strict=True)]

    def _look_for_ends(self, step: int, column: Sequence[int]) -> None:
        for row, live in enumerate(self._live(step)):
            if live:
                self._written[row].append(column[row])
                if self._options.ends(self._written[row]):
                    self._ended[row] = self._any_ended = True


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
