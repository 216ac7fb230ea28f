"""Collectives of a run: calls, and bytes that this rank sends in the usual rings."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _ring(ranks: int, nbytes: int) -> float:
    return 2 * (ranks - 1) / ranks * nbytes


def _to_all(ranks: int, nbytes: int) -> float:
    return (ranks - 1) * nbytes


def _parts(ranks: int, nbytes: int) -> float:
    return (ranks - 1) / ranks * nbytes


def _once(_: int, nbytes: int) -> float:
    return nbytes


SENT: Mapping[str, tuple[str, Callable[[int, int], float]]] = {
    "all_reduce": ("all-reduce", _ring),
    "all_reduce_": ("all-reduce", _ring),
    "allreduce_": ("all-reduce", _ring),
    "all_gather_into_tensor": ("all-gather", _to_all),
    "_allgather_base_": ("all-gather", _to_all),
    "allgather_": ("all-gather", _to_all),
    "allgather_into_tensor_coalesced_": ("all-gather", _to_all),
    "reduce_scatter_tensor": ("reduce-scatter", _parts),
    "_reduce_scatter_base_": ("reduce-scatter", _parts),
    "reduce_scatter_": ("reduce-scatter", _parts),
    "broadcast": ("broadcast", _once),
    "broadcast_": ("broadcast", _once),
    "all_to_all_single": ("all-to-all", _parts),
    "alltoall_base_": ("all-to-all", _parts),
    "send": ("send", _once),
}
"""Operators of torch.distributed: the collective, and the bytes that a rank sends for the bytes that it puts in."""

OUTPUT_FIRST = {"_allgather_base_", "_reduce_scatter_base_", "allgather_", "reduce_scatter_", "alltoall_base_"}
OUTPUT_FIRST |= {"allgather_into_tensor_coalesced_"}
"""Operators whose second argument is what a rank puts in; of the others it is the first."""


class Collectives(TorchDispatchMode):
    """Counts the collectives inside of a `with` block over `ranks` processes.

    `calls` and `sent` (bytes) have an entry for each kind, such as "all-reduce".
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.calls: dict[str, int] = defaultdict(int)
        self.sent: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, _types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional") and name in SENT:
            kind, sent = SENT[name]
            self.calls[kind] += 1
            self.sent[kind] += sent(self.ranks, _nbytes(args[name in OUTPUT_FIRST]))
        return func(*args, **(kwargs or {}))


def _nbytes(put_in: Any) -> int:
    if isinstance(put_in, Tensor):
        return put_in.nbytes
    return sum(map(_nbytes, put_in)) if isinstance(put_in, list | tuple) else 0


def fitted(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Seconds until a collective of no bytes is done, and bytes per second: the line through (bytes, seconds).

    Of two points at least, the first the smallest and the last the largest.
    """
    (least, start), (most, end) = points[0], points[-1]
    bandwidth = (most - least) / max(end - start, torch.finfo(torch.float64).tiny)
    return max(start - least / bandwidth, 0.0), bandwidth
