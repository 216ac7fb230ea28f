"""Names and layouts of tensors in a checkpoint."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Region = tuple[slice, ...]
"""A part of a tensor: from where to where in each dimension, as numbers."""

EXPERT = "{expert}"
"""Stands for the number of an expert in the name of a stored tensor."""

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Stored:
    """Name and layout of a module's weight and bias in a checkpoint.

    `module`: the name, with `{}` for the layer, and with `{expert}` where the first dimension of the model's tensor is
    that of experts, each of which is stored by itself. `transposed`: weights are stored as [in, out]. `parts`: the
    modules of the model that are stored as one module, concatenated by their outputs, each as its share of them, such
    as (4, 1, 1) for 4 query heads and one of keys and values; `part` is the index of this one. `groups`: each of these
    modules is cut into so many runs of outputs, and the first runs of all are stored first, then the second runs.
    `as_row`: a vector is stored as a matrix of one row.
    """

    module: str
    transposed: bool = False
    part: int = 0
    parts: tuple[int, ...] = (1,)
    groups: int = 1
    as_row: bool = False

    def shape(self, ours: torch.Size) -> tuple[int, ...]:
        """The stored shape, from the shape in the model."""
        whole = (*(1,) * self.as_row, self._rows(ours[0]), *ours[1:])
        return whole[::-1] if self.transposed else whole

    def region(self, ours: Region, rows: int) -> Region:
        """Where a part of the model's tensor, which has `rows` rows in all, is in the stored tensor.

        With several groups it is all rows of those that the part touches, of which `turned` takes the part's.
        """
        if self.groups == 1:
            shift = self._before(rows)
            in_file = slice(ours[0].start + shift, ours[0].stop + shift)
        else:
            first, last = self._groups(ours, rows)
            together = self._rows(rows // self.groups)
            in_file = slice(first * together, last * together)
        moved = (*(slice(0, 1),) * self.as_row, in_file, *ours[1:])
        return moved[::-1] if self.transposed else moved

    def turned(self, stored: Tensor, ours: Region, rows: int) -> Tensor:
        """A part of the model's tensor, from the region of the stored one: a view, or one copy if there are groups."""
        if self.as_row:
            stored = stored[0]
        elif self.transposed and stored.ndim == 2:
            stored = stored.t()
        if self.groups == 1:
            return stored
        first, last = self._groups(ours, rows)
        run = rows // self.groups
        runs = stored.view(last - first, -1, *stored.shape[1:]).narrow(1, self._before(run), run).flatten(0, 1)
        return runs[ours[0].start - first * run : ours[0].stop - first * run]

    def slices(self, name: str, ours: Tensor) -> list[tuple[str, Tensor]]:
        """The names of the stored tensors, and the tensors of the model for each: one, or one of each expert."""
        if EXPERT not in self.module:
            return [(name, ours)]
        return [(name.replace(EXPERT, str(expert)), each) for expert, each in enumerate(ours.detach().unbind())]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The stored tensor, from the tensors of the model in order of their parts."""
        whole = parts[0]
        if len(parts) > 1:
            whole = torch.cat([part.reshape(self.groups, -1, *part.shape[1:]) for part in parts], 1).flatten(0, 1)
        if self.as_row:
            return whole[None].contiguous()
        return (whole.t() if self.transposed and whole.ndim == 2 else whole).contiguous()

    def _groups(self, ours: Region, rows: int) -> tuple[int, int]:
        """The first group that a part touches, and the one after the last; at least one."""
        run = rows // self.groups
        first = min(ours[0].start // run, self.groups - 1)
        return first, max(first + 1, -(-ours[0].stop // run))

    def _before(self, ours: int) -> int:
        """The rows of the parts before this one, where this one has `ours`."""
        return ours * sum(self.parts[: self.part]) // self.parts[self.part]

    def _rows(self, ours: int) -> int:
        """The rows of all parts where this one has `ours`."""
        return ours * sum(self.parts) // self.parts[self.part]


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


def heads_in_turn(module: str, num_heads: int, kv_heads: int) -> Names:
    """The layouts of projections that are stored as one module, by key/value heads: its queries, its key, its value."""
    parts = (num_heads // kv_heads, 1, 1)
    return {
        f"decoder.blocks.{{}}.attention.{name}": Stored(module, part=part, parts=parts, groups=kv_heads)
        for part, name in enumerate(("q_proj", "k_proj", "v_proj"))
    }
