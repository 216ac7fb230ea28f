"""Table of a function of positions, computed in float64 and kept in blocks."""

from collections.abc import Callable
from operator import methodcaller

import torch
from torch import Tensor

from ..masks import positions as run_of_positions
from .scheme import Positions

BLOCK = 2048
"""Positions per kept block. A run of positions within one block costs one slice of each tensor."""

BLOCKS_KEPT = 8
"""Upper limit of the kept blocks of one table."""

Formula = Callable[[Tensor], tuple[Tensor, ...]]
"""Function of float64 positions [...] that gives the table's float64 tensors [..., width] on the same device."""


class BlockTable:
    """Values of a formula at positions, rounded once and kept per block, dtype and device.

    The `BLOCKS_KEPT` most recently used blocks are kept. They are not parameters or buffers, so `.to()` does not
    change them. A copy or a pickle contains no blocks and computes them again.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}
        self.latest: tuple[object, list[Tensor]] = (None, [])
        """The key of the block used last, (number, dtype, device), and its tensors: a decode step looks here first."""

    def rows(self, formula: Formula, positions: Positions, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """The formula's tensors at `positions`: [L, width] for a range, [..., width] for a tensor of that shape."""
        if not isinstance(positions, range):
            # Where they are on an NVIDIA GPU, so that the host does not wait for them.
            where = positions.device if positions.is_cuda else torch.device("cpu")
            return _computed(formula, positions, dtype, device, where)
        first, block = positions.start % BLOCK, positions.start // BLOCK
        if first + len(positions) > BLOCK:
            # Not kept. On an NVIDIA GPU it is computed there: the copy of 16,384 positions of width 128 took 4.1 of the
            # 8.6 ms of a layer of width 4,096 (H200).
            where = device if device.type == "cuda" else torch.device("cpu")
            return _computed(formula, run_of_positions(positions, where), dtype, device, where)
        key = (block, dtype, device)
        # Removed and inserted again, so that the most recently used block is last. Each operation is atomic: at worst
        # two threads compute the same block.
        kept = self._blocks.pop(key, None)
        if kept is None:
            run = range(block * BLOCK, (block + 1) * BLOCK)
            kept = _computed(formula, run_of_positions(run, torch.device("cpu")), dtype, device)
            for oldest in list(self._blocks)[: 1 - BLOCKS_KEPT]:
                self._blocks.pop(oldest, None)
        self._blocks[key] = kept
        self.latest = (key, kept)
        # Mapped in C: a decode step takes one row of every table.
        return list(map(methodcaller("narrow", 0, first, len(positions)), kept))

    def __getstate__(self) -> dict[str, object]:
        return {"_blocks": {}, "latest": (None, [])}


# Inference tensors could not be used later in a call that records gradients.
@torch.inference_mode(False)
@torch.no_grad()
def _computed(
    formula: Formula,
    positions: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    where: torch.device = torch.device("cpu"),  # noqa: B008
) -> list[Tensor]:
    # On the CPU unless the caller knows better, because not every device has float64.
    rows = formula(positions.to(where, torch.float64))
    # A copy from pageable host memory does not wait for the work that is queued on the device.
    return [tensor.to(device, dtype, non_blocking=True) for tensor in rows]
