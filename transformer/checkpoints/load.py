"""Reads a checkpoint: its configuration, checked key by key, and its tensors, one by one into a model of no memory."""

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import reduce
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..cache.validation import FLOATS
from ..errors import ArgumentError, ConfigurationError, FileFormatError
from .arguments import check_dtype, checked_device
from .documents import Keys, listed, read_object
from .families import FAMILIES
from .family import Family
from .folder import CONFIG, GENERATION, Folder, find_folder
from .limits import MOST_LISTED
from .names import Stored
from .size import check_size
from .weights import Shard, open_shards

FILES = (CONFIG, GENERATION, "tokenizer*.json", "model*.safetensors", "model.safetensors.index.json")
PICKLED_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Files that are fetched from the Hub."""

FEW = 4
"""Tensors of each kind that are named where a whole architecture is not supported."""

RELEASE_AFTER = 1 << 24
"""Bytes converted before the file's own pages, which are no longer needed, are given back."""


def load_config(path_or_name: str | PathLike[str], *, length: int | None = None, revision: str | None = None) -> Any:
    """The configuration of a checkpoint, as `load_model` would build it.

    Args and what it raises: those of `load_model`, as far as config.json goes.
    """
    folder = find_folder(path_or_name, [CONFIG, GENERATION], revision=revision)
    return _read_config(folder, length)[2]


def empty_model(
    path_or_name: str | PathLike[str], dtype: torch.dtype | None = None, *, revision: str | None = None
) -> Any:
    """The model of a checkpoint without its weights, on the device `meta`: for what shapes alone can tell.

    No file of weights is looked at; `dtype` is by default what config.json names, else float32. Raises as `load_model`
    does, as far as config.json goes.
    """
    check_dtype(dtype)
    folder = find_folder(path_or_name, [CONFIG, GENERATION], revision=revision)
    family, keys, config = _read_config(folder, None)
    words = {str(each).removeprefix("torch."): each for each in FLOATS}
    stored = keys.word("dtype" if "dtype" in keys else "torch_dtype", words, "float32")
    with torch.device("meta"):
        model = family.build(keys, config).to(dtype or stored)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            module.to(family.dtype(name, parameter.dtype))
    return model.eval()


# Weights made in inference mode could not be trained later. And they count no changes: what cross-attention keeps of a
# source could not be trusted.
@torch.inference_mode(False)
def load_model(
    path_or_name: str | PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    length: int | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
) -> Any:
    """The model of a checkpoint in the format of Hugging Face, in `eval()` mode.

    Weights that are stored in `dtype` already stay where they are, in the mapped file, until they are moved or written
    to; others are converted one at a time. The file must not be changed in place while the model lives; replacing or
    deleting it is harmless.

    Args:
        path_or_name: a folder with config.json and safetensors, or a model's name on the Hub (extra `hub`).
        dtype: of all weights; by default the stored one, the widest where there are several.
        device: where the weights go; by default PyTorch's.
        length: the longest row to come, for rotary scalings that depend on it ("dynamic", "longrope"); by default the
            length that the model was trained at before it was scaled.
        allow_pickle: whether to read pytorch_model.bin where there are no safetensors, weights alone.
        revision: the branch, tag or commit of a model on the Hub; by default its main branch.

    Raises:
        FileNotFoundError: there is no such folder, and no such model on the Hub, or no way to ask for it.
        ConfigurationError: config.json describes no model that can be built; names the key and the file.
        FileFormatError: torn or foreign files, files outside of the folder, missing, extra, misshapen or non-finite
            tensors, all of them listed.
        ArgumentError: a `dtype` that is not a float, a `length` that is not a whole number from 1, a `revision` of a
            folder, or an argument of another type.
        DeviceError: a `device` that this machine does not have.
    """
    check_dtype(dtype)
    where = checked_device(device)
    if not isinstance(allow_pickle, bool):
        raise ArgumentError(f"allow_pickle: expected True or False, got {allow_pickle!r:.200}")
    folder = find_folder(path_or_name, FILES + PICKLED_FILES if allow_pickle else FILES, revision=revision)
    family, keys, config = _read_config(folder, length)
    shards = open_shards(folder, allow_pickle=allow_pickle)
    if config.num_layers > len(shards):
        raise ConfigurationError(f"{keys.file}: num_layers={config.num_layers}, but there are {len(shards)} tensors")
    if family.head in shards:
        config = replace(config, tied_embeddings=False)
    with torch.device("meta"), _Unfilled():
        model = family.build(keys, config)
    places = _places(keys, family, model, shards)
    _fill(family, model, places, dtype or _stored_dtype(family, places), where)
    return model.eval()


def _read_config(folder: Folder, length: int | None) -> tuple[Family, Keys, Any]:
    if length is not None and (type(length) is not int or length < 1):
        raise ArgumentError(f"length: expected None or a whole number of at least 1, got {length!r}")
    file = folder.get(CONFIG)
    content = read_object(file)
    generation = folder.find(GENERATION)
    overriding = Keys({} if generation is None else read_object(generation), generation or file)
    keys = Keys(content, file, length=length)
    model_type = keys.word("model_type", {each.model_type: each.model_type for each in FAMILIES})
    family = next(each for each in FAMILIES if each.model_type == model_type and each.applies(keys))
    config = family.read(keys, overriding)
    check_size(config, file)
    return family, keys, config


class _Unfilled(TorchFunctionMode):
    """Leaves new tensors as they are: to draw numbers that the checkpoint replaces takes half of building the model."""

    _drawing = frozenset({nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_})

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func in self._drawing and "tensor" in kwargs else func(*args, **kwargs)


@dataclass(slots=True)
class _Place:
    """One tensor: its names in the model, and where the checkpoint has it, more than once where it is tied."""

    ours: list[str] = field(default_factory=list)
    stored: list[tuple[str, Stored, Shard]] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """The stored one."""
        name, _, shard = self.stored[0]
        return shard.dtypes[name]  # type: ignore[return-value]  # others were refused


def _places(keys: Keys, family: Family, model: nn.Module, shards: dict[str, Shard]) -> list[_Place]:
    """A place for each of the model's tensors. Raises FileFormatError, listing all, unless they and the stored fit."""
    bare = bool(family.base) and not any(name.startswith(family.base) for name in shards)
    places: dict[int, _Place] = defaultdict(_Place)
    expected: dict[int, str] = {}
    known, misshapen = set(), []
    stored_as = {family.todays_name(name): name for name in shards}
    for ours, parameter in model.named_parameters(remove_duplicate=False):
        place = places[id(parameter)]
        place.ours.append(ours)
        for name, stored in family.stored_names(ours):
            name = name.removeprefix(family.base) if bare else name
            expected.setdefault(id(parameter), name)
            if name not in stored_as:
                continue
            name = stored_as[name]
            shard = shards[name]
            known.add(name)
            place.stored.append((name, stored, shard))
            found, wanted = (shard.shapes[name], shard.dtypes[name]), stored.shape(parameter.shape)
            if found[0] != wanted or found[1] not in FLOATS:
                misshapen.append(f"{name} {list(found[0])} of {found[1]} instead of {list(wanted)} of floats")
    missing = [expected[key] for key, place in places.items() if not place.stored]
    unknown = [name for name in shards if name not in known and not family.ignores(name, bare, keys)]
    complaints = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
    if any(complaints.values()):
        others = family.others(keys)
        got = f"those of architectures={others}, which is not supported" if others else "others"
        most = FEW if others else MOST_LISTED
        told = "; ".join(f"{kind}: {listed(names, most)}" for kind, names in complaints.items() if names)
        raise FileFormatError(
            f"{keys.file.parent}: expected the tensors of {family.expected(keys)}, as config.json describes it, "
            f"got {got}. {told}"
        )
    return list(places.values())


def _stored_dtype(family: Family, places: list[_Place]) -> torch.dtype:
    """The widest that is stored; float16 where only what that keeps in float32 is wider."""
    others = {place.dtype for place in places if not family.keeps_float32(place.ours[0])}
    if others == {torch.float16}:
        return torch.float16
    return reduce(torch.promote_types, {place.dtype for place in places})


def _fill(family: Family, model: nn.Module, places: list[_Place], wanted: torch.dtype, device: torch.device) -> None:
    """Gives the model its tensors, one at a time. Raises FileFormatError, listing those that are not finite."""
    wrong: dict[str, Shard] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    converted = 0
    for place in places:
        name, stored, shard = place.stored[0]
        dtype = family.dtype(place.ours[0], wanted)
        source = stored.take(shard.tensor(name))
        for other, layout, its_shard in place.stored[1:]:
            if not torch.equal(source, layout.take(its_shard.tensor(other))):
                raise FileFormatError(
                    f"{shard.file}: expected {name} and {other} to be the same, as {family.why_equal(other)}, got "
                    "different tensors"
                )
        tensor = source
        if source.dtype != dtype or source.device != device or not source.is_contiguous():
            tensor = torch.empty(source.shape, dtype=dtype, device=device).copy_(source)
            converted += source.nbytes
        if not _is_finite(tensor):
            wrong[name] = shard
        parameter = nn.Parameter(tensor)
        for ours in place.ours:
            module, _, kind = ours.rpartition(".")
            setattr(modules[module], kind, parameter)
        del source, tensor
        if converted > RELEASE_AFTER:
            shard.release()
            converted = 0
    if wrong:
        files = sorted({str(shard.file) for shard in wrong.values()})
        raise FileFormatError(f"{', '.join(files)}: expected finite numbers of {wanted}, got others in {sorted(wrong)}")


def _is_finite(tensor: Tensor) -> bool:
    # The norm is quick, and NaN and Inf cannot pass it; where it overflows by itself each number is looked at.
    return math.isfinite(torch.linalg.vector_norm(tensor).item()) or bool(tensor.isfinite().all())
