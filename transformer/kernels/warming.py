"""Warm-up: the compiled kernels of a model loaded before its first call."""

import torch
from torch import nn

from ..errors import ArgumentError
from . import encoding, few_queries, norms, rotation
from .compiled import are_available
from .dispatch import Kernel
from .few_rows import KERNELS
from .linear_weights import linear_weight


def warm_up(model: nn.Module) -> None:
    """Compiles the CPU kernels that a model uses, or reads them from disk, so that no call of it has to.

    Without numba (the extra `fast`), or with `MODULAR_ATTENTION_COMPILED=0`, there is nothing to do. Each dtype takes
    some seconds, once on a machine. Raises ArgumentError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected an nn.Module, got {type(model).__name__}; give the model itself")
    if not are_available():
        return
    dtypes: set[torch.dtype] = set()
    encoded: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(vars(module).get("kernel"), Kernel):
            few_queries.KERNEL.load()
            if vars(module).get("cache_dtype") is not None:
                encoded.update(weight.dtype for weight in module.parameters())
        if type(module) is nn.Linear:
            weight = linear_weight(module, module.weight.dtype)
            if weight is not None and (kernel := KERNELS.get((weight.numbers.dtype, module.weight.dtype))):
                kernel.load()
                dtypes.add(module.weight.dtype)
    for dtype in encoded & encoding.KERNELS.keys():
        encoding.KERNELS[dtype].load()
    for dtype in dtypes:
        # Of whatever norms and positions the model has.
        norms.KERNELS[dtype].load()
        rotation.KERNELS[dtype].load()
