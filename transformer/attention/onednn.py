"""oneDNN's own linear in float32, which PyTorch's compiler calls and its `F.linear` does not."""

import torch
from torch import Tensor

AVAILABLE = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
"""Whether this build of PyTorch has it."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [..., in] times `weight` [out, in], and a bias: float32 on the CPU, where no gradients are recorded."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
