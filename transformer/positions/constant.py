"""Numbers that a scheme keeps beside itself, exact whatever becomes of the module."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..tracing import is_compiling, is_fake, is_traced, real_tensors


class Constant:
    """A tensor on the CPU, and a copy of it on each device that has asked.

    Neither a cast of the module nor a file touches it, as it would a buffer. A step then copies nothing to its device,
    which would wait, and which CUDA graphs refuse. `make` gives a tensor on the CPU; it has numbers even where the
    module is built under fake tensors.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        # Of the ordinary kind: one made in inference mode could not be used where gradients are recorded later.
        with real_tensors(), torch.inference_mode(False):
            tensor = make()
            self._numbers = tensor.flatten().tolist()
        self._copies = [tensor]

    def beside(self, x: Tensor) -> Tensor:
        """The tensor on the device of `x`, to be worked with together with it."""
        if torch.compiler.is_dynamo_compiling() or not is_fake(x):
            return self.on(x.device)
        # Fake tensors may meet no others, and nothing of theirs may be kept.
        kept = self._copies[0]
        return torch.tensor(self._numbers, dtype=kept.dtype, device=x.device).view(kept.shape)

    def on(self, device: torch.device) -> Tensor:
        """The tensor there."""
        for copy in self._copies:
            if copy.device == device:
                return copy
        copy = _copied(self._copies[0], device)
        if not is_compiling() and (copy.is_meta or not is_traced(copy)):
            self._copies.append(copy)
        return copy

    def __getstate__(self) -> dict[str, object]:
        return {"_numbers": self._numbers, "_copies": self._copies[:1]}


# A copy that was made in inference mode could not be used where gradients are recorded later.
@torch.inference_mode(False)
def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    # From ordinary host memory this waits for nothing that the device has still to do.
    return tensor.to(device, non_blocking=True)
