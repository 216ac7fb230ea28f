"""From our names of tensors to those in a checkpoint, and from the one layout to the other."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Stored:
    """Where a module's weight and bias stand: in `module` of the checkpoint, `{}` being the layer.

    `transposed`: weights are kept as [in, out]. With `parts` several of our modules are kept as one, by their outputs;
    this is number `part` of them.
    """

    module: str
    transposed: bool = False
    part: int = 0
    parts: int = 1

    def shape(self, ours: torch.Size) -> tuple[int, ...]:
        """The stored shape, given our own."""
        whole = (ours[0] * self.parts, *ours[1:])
        return whole[::-1] if self.transposed else whole

    def take(self, stored: Tensor) -> Tensor:
        """A view of the stored tensor, in our layout."""
        whole = stored.t() if self.transposed and stored.ndim == 2 else stored
        size = whole.shape[0] // self.parts
        return whole.narrow(0, self.part * size, size)

    def join(self, parts: list[Tensor]) -> Tensor:
        """Our tensors, part by part, in the stored layout."""
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (whole.t() if self.transposed and whole.ndim == 2 else whole).contiguous()


Names = Mapping[str, str | Stored]
"""Our modules, each with where it stands in a checkpoint; `{}` is the index of the layer."""


class Layer(NamedTuple):
    """A name with `{}` in the place of its first number, and that number."""

    pattern: str
    layer: str


def layer_of(name: str) -> Layer:
    """The layer that a tensor's name speaks of; an empty one where it speaks of none."""
    found = _LAYER.search(name)
    return Layer(_LAYER.sub(".{}.", name, count=1), found.group(1) if found else "")
