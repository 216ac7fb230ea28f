"""Rotation angles `position * frequency`, exact to 1e-6 at position 4,000,000 on every device."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .constant import Constant

FRACTION_BITS = 32
"""Bits per full turn of an integer angle: a resolution of 1.5e-9 radians. Frequencies have twice as many bits."""

TURN = 1 << FRACTION_BITS
"""A full turn (2 pi) as an integer angle."""


class Angles:
    """Angles of positions for fixed frequencies, float64 [n], in radians per position.

    Angles are computed in float64, on the CPU or an NVIDIA GPU. A traced call on another device must stay on that
    device, which may not support float64. It uses integer fractions of a turn, which are exact modulo one turn.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._radians = Constant(make)
        self._turns = Constant(lambda: _halves(self._radians.on(torch.device("cpu"))))

    def prepare(self, device: torch.device) -> None:
        """Copies the constants of compiled steps to their device, because a compiled step copies nothing."""
        if device.type != "cpu":
            self._turns.on(device)

    def exact(self, positions: Tensor) -> Tensor:
        """Angles float64 [..., n] of `positions` [...], on their device, which has float64."""
        return positions.to(torch.float64).unsqueeze(-1) * self._radians.for_device_of(positions)

    def traced(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Angles [..., n] on the device of `positions`: float64 on the CPU or for float64, else as below."""
        if positions.is_cpu or dtype is torch.float64:
            return self.exact(positions)
        return self.within_half_a_turn(positions)

    def within_half_a_turn(self, positions: Tensor) -> Tensor:
        """Angles float32 [..., n] from -pi to pi, of int64 `positions` [...] below 2 ** 31."""
        upper, lower = self._turns.for_device_of(positions).unbind()
        positions = positions.unsqueeze(-1)
        # An overflow of the upper product is a whole number of turns.
        turns = positions * upper + ((positions * lower) >> FRACTION_BITS)
        turns = ((turns + TURN // 2) & (TURN - 1)) - TURN // 2
        return turns.to(torch.float32) * (2.0 * math.pi / TURN)


def _halves(radians: Tensor) -> Tensor:
    """The first and the second 32 bits of each frequency's fraction of a turn: int64 [2, n]."""
    turns = [round(math.ldexp(frequency / (2.0 * math.pi) % 1.0, 2 * FRACTION_BITS)) for frequency in radians.tolist()]
    halves = [[turn // TURN % TURN for turn in turns], [turn % TURN for turn in turns]]
    return torch.tensor(halves, dtype=torch.int64, device="cpu")
