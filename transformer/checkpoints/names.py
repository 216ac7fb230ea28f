"""Names and layouts of tensors in a checkpoint."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Region = tuple[slice, ...]
"""A part of a tensor: from where to where in each dimension, as numbers."""

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Stored:
    """Name and layout of a module's weight and bias in a checkpoint.

    `module`: the name, with `{}` for the layer. `transposed`: weights are stored as [in, out]. `parts`: number of
    modules of the model that are stored as one module, concatenated by their outputs; `part` is the index of this one.
    `as_row`: a vector is stored as a matrix of one row.
    """

    module: str
    transposed: bool = False
    part: int = 0
    parts: int = 1
    as_row: bool = False

    def shape(self, ours: torch.Size) -> tuple[int, ...]:
        """The stored shape, from the shape in the model."""
        whole = (*(1,) * self.as_row, ours[0] * self.parts, *ours[1:])
        return whole[::-1] if self.transposed else whole

    def region(self, ours: Region, rows: int) -> Region:
        """Where a part of the model's tensor, which has `rows` rows in all, is in the stored tensor."""
        first, before = ours[0], self.part * rows
        moved = (*(slice(0, 1),) * self.as_row, slice(before + first.start, before + first.stop), *ours[1:])
        return moved[::-1] if self.transposed else moved

    def turned(self, stored: Tensor) -> Tensor:
        """A view of a part of the stored tensor in the layout of the model."""
        if self.as_row:
            return stored[0]
        return stored.t() if self.transposed and stored.ndim == 2 else stored

    def join(self, parts: list[Tensor]) -> Tensor:
        """The stored tensor, from the tensors of the model in order of their parts."""
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.as_row:
            return whole[None].contiguous()
        return (whole.t() if self.transposed and whole.ndim == 2 else whole).contiguous()


Names = Mapping[str, str | Stored]
"""Modules of the model, each with its name or layout in a checkpoint; `{}` is the index of the layer.

A single tensor may be named too, such as "head.proj.bias"; the name in the checkpoint is then that of a tensor.
"""


class Layer(NamedTuple):
    """A name with `{}` instead of its first number, and that number."""

    pattern: str
    layer: str


def layer_of(name: str) -> Layer:
    """The layer in a tensor's name; an empty text if there is none."""
    found = _LAYER.search(name)
    return Layer(_LAYER.sub(".{}.", name, count=1), found.group(1) if found else "")
