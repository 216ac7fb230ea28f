"""Bytes of memory that the tensors of this process keep alive, counted by storage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


def address(tensor: torch.Tensor) -> int:
    """The address of a tensor's storage, for any view of it."""
    return tensor.untyped_storage().data_ptr()


@dataclass
class Growth:
    """Bytes that became alive in a block (negative if memory was freed), known at its end."""

    bytes: int = 0


@contextmanager
def alive_since() -> Iterator[Growth]:
    """How many bytes more are alive at the end of the block than at its beginning.

    Garbage is collected before, not after: what only a cycle keeps alive counts. What was there when the tests were
    collected is frozen and never counts.
    """
    gc.collect()
    growth, before = Growth(), _alive()
    yield growth
    growth.bytes = _alive() - before


def _alive() -> int:
    # By type, not by isinstance: that would wake lazy modules and proxies. What a compiler traces with has no memory.
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [each for each in tensors if each.device.type == "cpu" and each.layout is torch.strided]
    real = [each for each in tensors if not torch._is_functional_tensor(each)]
    storages = [tensor.untyped_storage() for tensor in real]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
