"""Angles of positions, `position * frequency`, that hold to 1e-6 at position 4,000,000 on every device."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .constant import Constant

FRACTION_BITS = 32
"""Bits of a turn that an angle in whole numbers has: 1.5e-9 radians. Frequencies have twice as many."""

TURN = 1 << FRACTION_BITS


class Angles:
    """Angles under fixed frequencies, float64 [n] on the CPU, in radians per position.

    In float64 on the CPU. A traced call on another device cannot leave it, and may find no float64 there: it works
    with the fractions of a turn as whole numbers, so that nothing is lost before what is left lies within one turn.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._radians = Constant(make)
        self._turns = Constant(lambda: _halves(self._radians.on(torch.device("cpu"))))

    def prepare(self, device: torch.device) -> None:
        """Puts what compiled steps need on their device, since those copy nothing."""
        if device.type != "cpu":
            self._turns.on(device)

    def exact(self, positions: Tensor) -> Tensor:
        """float64 [..., n] on the CPU, for `positions` [...] there."""
        return positions.to(torch.float64).unsqueeze(-1) * self._radians.beside(positions)

    def traced(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., n] where `positions` are: float64 on the CPU, or where `dtype` is; else float32 within half a turn."""
        if positions.is_cpu or dtype is torch.float64:
            return self.exact(positions)
        return self.within_half_a_turn(positions)

    def within_half_a_turn(self, positions: Tensor) -> Tensor:
        """float32 [..., n] from -pi to pi, for int64 `positions` [...] below 2 ** 31."""
        upper, lower = self._turns.beside(positions).unbind()
        positions = positions.unsqueeze(-1)
        # The upper half times a position overflows by whole turns alone.
        turns = positions * upper + ((positions * lower) >> FRACTION_BITS)
        turns = ((turns + TURN // 2) & (TURN - 1)) - TURN // 2
        return turns.to(torch.float32) * (2.0 * math.pi / TURN)


def _halves(radians: Tensor) -> Tensor:
    """The first and the second 32 bits of each frequency's fraction of a turn: int64 [2, n]."""
    turns = [round(math.ldexp(frequency / (2.0 * math.pi) % 1.0, 2 * FRACTION_BITS)) for frequency in radians.tolist()]
    halves = [[turn // TURN % TURN for turn in turns], [turn % TURN for turn in turns]]
    return torch.tensor(halves, dtype=torch.int64, device="cpu")
