"""Checks of the prompt that rows of a saved conversation share, against the numbers of these rows."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .lengths import Lengths
from .shared_prefix import SharedPrefix
from .snapshot import KEPT, OBSERVED, PREFIX


def are_rows(batch: int) -> Callable[[Any], bool]:
    """Whether a value is a number of a row of a prefix, for each row of a batch."""

    def fits(value: object) -> bool:
        return isinstance(value, list) and len(value) == batch and all(type(row) is int and row >= 0 for row in value)

    return fits


def check_prefix(
    name: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], stored_and_start: tuple[Lengths, Lengths]
) -> Lengths:
    """How many tokens each prefix has. Raises ValueError unless every row has one of them, which ends where its own
    tokens begin."""
    (key, value), rows, (stored, start) = (tensors[each] for each in PREFIX), numbers["prefix_rows"], stored_and_start
    if {*rows} != {*range(key.shape[0])}:
        raise ValueError(f"expected prefix_rows from 0 to {key.shape[0] - 1} in {name!r}, each of them, got {rows}")
    if numbers["window"] is not None or tensors.keys() & {KEPT, *OBSERVED} or stored != start:
        raise ValueError(f"expected a shared prefix without a window and a compression in {name!r}")
    ends = stored.expand(len(rows))
    if len({*zip(rows, ends, strict=True)}) != key.shape[0]:
        raise ValueError(f"expected rows of one prefix in {name!r} to continue it at one position, got {rows}, {ends}")
    if key.shape[2] != max(ends):
        raise ValueError(f"expected a prefix of {max(ends)} tokens in {name!r}, got {key.shape[2]}")
    return SharedPrefix(key, value, tuple(rows)).lengths(stored)
