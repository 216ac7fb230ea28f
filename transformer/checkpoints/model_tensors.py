"""Tensors of a model and of its checkpoint: matched by name, shape and dtype, and loaded one at a time."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor, nn

from ..cache.snapshot import FLOATS
from ..errors import FileFormatError
from .documents import Keys, listed
from .family import Family
from .limits import MAX_LISTED_NAMES
from .names import Region, Stored
from .processes import Processes
from .weights import Shard

MAX_LISTED_IF_UNSUPPORTED = 4
"""Tensors of each kind in the error message for an unsupported architecture."""

RELEASE_AFTER_BYTES = 1 << 22
"""Bytes that are converted before the mapped pages of the file are released."""


@dataclass(slots=True)
class ModelTensor:
    """A tensor of the model: its names there, and its names, layouts and files in the checkpoint (several if tied)."""

    ours: list[str] = field(default_factory=list)
    stored: list[tuple[str, Stored, Shard]] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        name, _, shard = self.stored[0]
        return shard.dtypes[name]  # type: ignore[return-value]  # other dtypes were refused

    def is_as_stored(self, ndim: int) -> bool:
        """True if the model may have the stored tensor itself, whose layout is that of one with `ndim` dimensions."""
        _, layout, shard = self.stored[0]
        return layout.groups == 1 and not (layout.transposed and ndim == 2) and not shard.copies


def match_tensors(keys: Keys, family: Family, model: nn.Module, shards: dict[str, Shard]) -> list[ModelTensor]:
    """Matches the model's tensors to the stored ones. Raises FileFormatError, with all differences, if they differ."""
    bare = bool(family.base) and not any(name.startswith(family.base) for name in shards)
    tensors: dict[int, ModelTensor] = defaultdict(ModelTensor)
    expected: dict[int, str] = {}
    known, misshapen = set(), []
    stored_as = {family.current_name(name): name for name in shards}
    for ours, parameter in model.named_parameters(remove_duplicate=False):
        entry = tensors[id(parameter)]
        entry.ours.append(ours)
        for name, stored in family.stored_names(ours):
            name = name.removeprefix(family.base) if bare else name
            expected.setdefault(id(parameter), name)
            if name not in stored_as:
                continue
            name = stored_as[name]
            shard = shards[name]
            known.add(name)
            entry.stored.append((name, stored, shard))
            found, wanted = (shard.shapes[name], shard.dtypes[name]), stored.shape(parameter.shape)
            if found[0] != wanted or found[1] not in FLOATS:
                misshapen.append(f"{name} {list(found[0])} of {found[1]} instead of {list(wanted)} of floats")
    missing = [expected[key] for key, entry in tensors.items() if not entry.stored]
    unknown = [name for name in shards if name not in known and not family.ignores(name, bare, keys)]
    differences = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
    if any(differences.values()):
        others = family.unknown_architectures(keys)
        got = f"those of architectures={others}, which is not supported" if others else "others"
        most = MAX_LISTED_IF_UNSUPPORTED if others else MAX_LISTED_NAMES
        details = "; ".join(f"{kind}: {listed(names, most)}" for kind, names in differences.items() if names)
        raise FileFormatError(
            f"{keys.file.parent}: expected the tensors of {family.expected(keys)}, as config.json describes it, "
            f"got {got}. {details}"
        )
    return list(tensors.values())


def stored_dtype(family: Family, tensors: list[ModelTensor]) -> torch.dtype:
    """The widest stored dtype; float16 if only the tensors that stay float32 in a float16 model are wider."""
    others = {entry.dtype for entry in tensors if not family.keeps_float32(entry.ours[0])}
    if others == {torch.float16}:
        return torch.float16
    return reduce(torch.promote_types, {entry.dtype for entry in tensors})


def load_tensors(
    family: Family,
    model: nn.Module,
    tensors: list[ModelTensor],
    wanted: torch.dtype | None,
    device: torch.device,
    processes: Processes,
) -> None:
    """Loads this process's parts of the tensors into the model, one at a time, by default each in its own dtype.

    Raises FileFormatError, with the names of non-finite tensors.
    """
    wrong: dict[str, Shard] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    converted = 0
    for entry in tensors:
        name, _, shard = entry.stored[0]
        dtype = entry.dtype if wanted is None else family.dtype(entry.ours[0], wanted)
        places = [(modules[path], kind) for path, _, kind in (ours.rpartition(".") for ours in entry.ours)]
        empty = places[0][0].get_parameter(places[0][1])
        region = processes.region(empty)
        is_whole = all(each.stop - each.start == size for each, size in zip(region, empty.shape, strict=True))
        stays = is_whole and entry.dtype is dtype and device.type == "cpu" and entry.is_as_stored(empty.ndim)
        source = _read(family, entry, region, empty.shape[0], stays=stays)
        tensor = source
        if source.dtype != dtype or source.device != device or not source.is_contiguous() or _is_part(source):
            tensor = torch.empty(source.shape, dtype=dtype, device=device).copy_(source)
        if tensor is not source or not stays:
            converted += source.nbytes
        if not _is_finite(tensor):
            wrong[name] = shard
        parameter = processes.filled(empty, tensor)
        for module, kind in places:
            setattr(module, kind, parameter)
        del source, tensor
        if converted > RELEASE_AFTER_BYTES:
            shard.release()
            converted = 0
    if wrong:
        files, kind = sorted({str(shard.file) for shard in wrong.values()}), f" of {wanted}" if wanted else ""
        raise FileFormatError(f"{', '.join(files)}: expected finite numbers{kind}, got others in {sorted(wrong)}")


def _read(family: Family, entry: ModelTensor, region: Region, rows: int, *, stays: bool) -> Tensor:
    """A part of a tensor that has `rows` rows in all. Raises FileFormatError if stored tensors that are tied differ."""
    found: list[tuple[str, Shard, Tensor]] = []
    for name, layout, shard in entry.stored:
        tensor = layout.turned(shard.part(name, layout.region(region, rows), stays=stays), region, rows)
        if found and not torch.equal(found[0][2], tensor):
            raise FileFormatError(
                f"{found[0][1].file}: expected {found[0][0]} and {name} to be the same, as {family.why_equal(name)}, "
                "got different tensors"
            )
        found.append((name, shard, tensor))
    return found[0][2]


def _is_part(tensor: Tensor) -> bool:
    """True if more than the tensor stays in memory, or in the mapped file, with it."""
    return tensor.untyped_storage().nbytes() > tensor.nbytes


def _is_finite(tensor: Tensor) -> bool:
    # A sum reads as fast as memory does, and is not finite if an element is NaN or Inf. If finite elements overflow it,
    # each is checked.
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())
