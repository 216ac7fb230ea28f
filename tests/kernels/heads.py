"""Inputs of a kernel, and the largest tensor that a call forms."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transformer.kernels import Kernel


def heads(groups: int, length: int, keys: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = [(2, 4, length, 8), (2, groups, keys, 8), (2, groups, keys, 8)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def both(kernel: Kernel, *inputs: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The fused way (where nothing forbids it) and the products that weights ask for."""
    return kernel(*inputs, **options)[0], kernel(*inputs, **options, return_weights=True)[0]


def largest_result(run: Callable[[], object]) -> int:
    """Bytes of the largest tensor that any operation of a call gives."""
    largest = 0

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            # A view shows what was there before.
            if isinstance(result, torch.Tensor) and not func.is_view:
                largest = max(largest, result.nbytes)
            return result

    with Watching():
        run()
    return largest
