"""Limits of the machine: reading buffers once, and multiplying matrices. The larger one is the limit of a case."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .case import Limit
from .grid import Place

WIDTH = 1024
"""Rows and columns of the matrices that show how fast the machine multiplies."""


def reading(tensors: Sequence[Tensor], times: int = 1) -> Limit:
    """Reads these buffers, as sums of their 4 or 8 byte words, `times` times in one run of a candidate."""
    words = [_words(tensor) for tensor in tensors]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return Limit(lambda: [word.sum() for word in words], nbytes, times * nbytes, "GB/s")


def arithmetic(flops: float, place: Place) -> Limit:
    """Multiplies two matrices, in the dtype of the case; `flops` are those of a candidate's run."""
    left, right = place.random(WIDTH, WIDTH), place.random(WIDTH, WIDTH)
    return Limit(lambda: torch.mm(left, right), 2 * WIDTH**3, flops, "GFLOP/s")


def _words(tensor: Tensor) -> Tensor:
    # Sums of 8 and 16 bit numbers are slow, so the bytes are read as a wider type, but for a few at the end.
    if tensor.element_size() >= 4:
        return tensor
    flat, word = tensor.view(-1) if tensor.is_contiguous() else tensor, 8 // tensor.element_size()
    return flat[..., : flat.shape[-1] // word * word].view(torch.int64)
