"""Numbers that a scheme keeps beside itself, exact whatever becomes of the module."""

import torch
from torch import Tensor


class Constant:
    """A tensor on the CPU, and a copy of it on each device that has asked.

    Neither a cast of the module nor a file touches it, as it would a buffer. A step then copies nothing to its device,
    which would wait, and which CUDA graphs refuse.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copies = [tensor]

    def on(self, device: torch.device) -> Tensor:
        """The tensor there."""
        for copy in self._copies:
            if copy.device == device:
                return copy
        copy = _copied(self._copies[0], device)
        if not torch.compiler.is_compiling():
            self._copies.append(copy)
        return copy

    def __getstate__(self) -> dict[str, object]:
        return {"_copies": self._copies[:1]}


# A copy that was made in inference mode could not be used where gradients are recorded later.
@torch.inference_mode(False)
def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    # From ordinary host memory this waits for nothing that the device has still to do.
    return tensor.to(device, non_blocking=True)
