"""Constant tensors of a position scheme, which casts of the module do not change."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..tracing import is_compiling, is_fake, is_traced, real_tensors


class Constant:
    """A constant tensor on the CPU, with a copy on each device that uses it.

    Unlike a buffer it is not changed by a cast of the module or by a file. The kept copies mean that a step copies
    nothing to its device: such a copy would wait, and CUDA graphs refuse it. `make` gives the tensor, on the CPU. The
    tensor is real, also if the module is built under fake tensors.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        # Not an inference tensor, because that could not be used later in a call that records gradients.
        with real_tensors(), torch.inference_mode(False):
            tensor = make()
            self._numbers = tensor.flatten().tolist()
        self._copies = [tensor]

    def for_device_of(self, x: Tensor) -> Tensor:
        """The tensor on the device of `x`; a fake tensor if `x` is one."""
        if torch.compiler.is_dynamo_compiling() or not is_fake(x):
            return self.on(x.device)
        # Real and fake tensors cannot be combined, and a fake tensor must not be kept.
        kept = self._copies[0]
        return torch.tensor(self._numbers, dtype=kept.dtype, device=x.device).view(kept.shape)

    def on(self, device: torch.device) -> Tensor:
        """The tensor on `device`."""
        for copy in self._copies:
            if copy.device == device:
                return copy
        copy = _copied(self._copies[0], device)
        if not is_compiling() and (copy.is_meta or not is_traced(copy)):
            self._copies.append(copy)
        return copy

    def __getstate__(self) -> dict[str, object]:
        return {"_numbers": self._numbers, "_copies": self._copies[:1]}


# An inference tensor could not be used later in a call that records gradients.
@torch.inference_mode(False)
def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    # A copy from pageable host memory does not wait for the work that is queued on the device.
    return tensor.to(device, non_blocking=True)
