"""Limits of the machine: reading buffers once, and multiplying matrices. The larger one is the limit of a case."""

import time
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
    """Multiplies two matrices; `flops` are those of a candidate's run.

    In the dtype of the case, or in float32 where the machine does that faster: numbers of 16 bits may be converted, and
    a processor without products of bfloat16 does 1 GFLOP/s of them instead of 60.
    """
    given = place.random(WIDTH, WIDTH), place.random(WIDTH, WIDTH)
    pairs = [given] if given[0].element_size() > 2 else [given, tuple(each.float() for each in given)]
    left, right = pairs[0] if len(pairs) == 1 else min(pairs, key=_seconds)
    return Limit(lambda: torch.mm(left, right), 2 * WIDTH**3, flops, "GFLOP/s")


def _seconds(pair: tuple[Tensor, Tensor]) -> float:
    torch.mm(*pair)
    began = time.perf_counter()
    torch.mm(*pair)
    return time.perf_counter() - began


def _words(tensor: Tensor) -> Tensor:
    # Sums of 8 and 16 bit numbers are slow, so the bytes are read as a wider type, but for a few at the end.
    if tensor.element_size() >= 4:
        return tensor
    flat, word = tensor.view(-1) if tensor.is_contiguous() else tensor, 8 // tensor.element_size()
    return flat[..., : flat.shape[-1] // word * word].view(torch.int64)
