"""A table over positions, worked out in float64 and kept in blocks, for the schemes that have one."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..masks import positions as run_of_positions
from .scheme import Positions

BLOCK = 2048
"""Positions per kept block; a run inside one block costs one slice of each tensor."""

BLOCKS_KEPT = 8

Formula = Callable[[Tensor], tuple[Tensor, ...]]
"""float64 positions [...] to the table's float64 tensors [..., width] on the same device."""


class BlockTable:
    """What a formula gives at positions, rounded once and kept per block, dtype and device.

    Of the blocks, the `BLOCKS_KEPT` used last stay. They belong to no module's parameters or buffers, so that `.to()`
    leaves them alone; a copy or a file carries none, and works them out again.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}

    def rows(self, formula: Formula, positions: Positions, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """The formula's tensors at `positions`: [L, width] for a range, [..., width] for a tensor of that shape."""
        if not isinstance(positions, range):
            return _formed(formula, positions, dtype, device)
        first, block = positions.start % BLOCK, positions.start // BLOCK
        if first + len(positions) > BLOCK:
            return _formed(formula, run_of_positions(positions, torch.device("cpu")), dtype, device)
        return [rows.narrow(0, first, len(positions)) for rows in self._block(formula, block, dtype, device)]

    def __getstate__(self) -> dict[str, object]:
        return {"_blocks": {}}

    def _block(self, formula: Formula, block: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        key = (block, dtype, device)
        # Taken out and put back, the block used last stands last. Each step is safe beside other threads: at worst two
        # of them work out the same block.
        kept = self._blocks.pop(key, None)
        if kept is None:
            run = range(block * BLOCK, (block + 1) * BLOCK)
            kept = _formed(formula, run_of_positions(run, torch.device("cpu")), dtype, device)
            for oldest in list(self._blocks)[: 1 - BLOCKS_KEPT]:
                self._blocks.pop(oldest, None)
        self._blocks[key] = kept
        return kept


# Tensors made in inference mode could not be used where gradients are recorded later.
@torch.inference_mode(False)
@torch.no_grad()
def _formed(formula: Formula, positions: Tensor, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    # The CPU works them out: not every device has float64.
    rows = formula(positions.to(torch.device("cpu"), torch.float64))
    # From ordinary host memory this waits for nothing that the device has still to do.
    return [tensor.to(device, dtype, non_blocking=True) for tensor in rows]
