"""Tensors of experts, which a checkpoint has one by one and a model in one: read as one tensor."""

import re
from collections import defaultdict
from functools import reduce
from typing import cast

import torch
from torch import Tensor

from .family import Family
from .names import EXPERT, Region, Stored
from .weights import Shard

Numbered = dict[int, tuple[str, Shard]]
"""Stored tensors of one kind in one layer, with their files, by the number of the expert."""


class StackedShard(Shard):
    """One tensor [N, ...] of the N experts of a layer, from their tensors of one shape."""

    copies = True

    def __init__(self, name: str, numbered: Numbered) -> None:
        self._parts = [numbered[expert] for expert in range(len(numbered))]
        first, shard = self._parts[0]
        self.file = shard.file
        self.shapes = {name: (len(self._parts), *shard.shapes[first])}
        dtypes = [shard.dtypes[each] for each, shard in self._parts]
        strange = next((dtype for dtype in dtypes if isinstance(dtype, str)), None)
        self.dtypes = {name: strange or reduce(torch.promote_types, cast("list[torch.dtype]", dtypes))}

    def part(self, name: str, region: Region, *, stays: bool) -> Tensor:  # noqa: ARG002 (always new memory)
        """A part of the tensor, in new memory."""
        parts = [shard.part(each, region[1:], stays=False) for each, shard in self._parts[region[0]]]
        return torch.stack([part.to(cast("torch.dtype", self.dtypes[name])) for part in parts])

    def release(self) -> None:
        """Releases the memory of read pages of the files."""
        for shard in {id(shard): shard for _, shard in self._parts}.values():
            shard.release()


def with_stacked_experts(family: Family, shards: dict[str, Shard]) -> dict[str, Shard]:
    """The shard of each tensor by name, with one tensor in the place of those of a layer's experts.

    Its name has `{expert}` for the number. Tensors without a number below theirs, or of several shapes, stay as they
    are, so that they are missed and named.
    """
    layouts = {entry.module for entry in family.names.values() if isinstance(entry, Stored) and EXPERT in entry.module}
    if not layouts:
        return shards
    patterns = [_pattern(module.removeprefix(family.base)) for module in layouts]
    found: dict[str, Numbered] = defaultdict(dict)
    for name, shard in shards.items():
        base = len(name) - len(name.removeprefix(family.base))
        for match in filter(None, (pattern.fullmatch(name, base) for pattern in patterns)):
            start, end = match.span("expert")
            found[name[:start] + EXPERT + name[end:]][int(match["expert"])] = (name, shard)
    joined = dict(shards)
    for name, numbered in found.items():
        shapes = {shard.shapes[each] for each, shard in numbered.values()}
        if len(shapes) == 1 and max(numbered) == len(numbered) - 1:
            joined[name] = StackedShard(name, numbered)
            for each, _ in numbered.values():
                del joined[each]
    return joined


def _pattern(module: str) -> re.Pattern[str]:
    escaped = re.escape(module).replace(re.escape(EXPERT), r"(?P<expert>0|[1-9]\d{0,5})")
    return re.compile(escaped.replace(re.escape("{}"), r"\d+") + r"\.\w+")
