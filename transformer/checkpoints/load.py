"""Loading of checkpoints: the configuration, checked key by key, and the tensors, one at a time into a meta model."""

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import reduce
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..cache.snapshot import FLOATS
from ..errors import ArgumentError, ConfigurationError, FileFormatError
from ..models import Composition
from .arguments import check_dtype, checked_device
from .config_file import read_config
from .documents import Keys, listed
from .family import Family
from .folder import CONFIG, GENERATION, find_folder
from .limits import MAX_LISTED_NAMES
from .names import Stored
from .weights import Shard, open_shards

FILES = (CONFIG, GENERATION, "tokenizer*.json", "model*.safetensors", "model.safetensors.index.json")
PICKLED_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Additional files for `allow_pickle`. Both are patterns of files that are fetched from the Hub."""

MAX_LISTED_IF_UNSUPPORTED = 4
"""Tensors of each kind in the error message for an unsupported architecture."""

RELEASE_AFTER_BYTES = 1 << 24
"""Bytes that are converted before the mapped pages of the file are released."""


def empty_model(
    path_or_name: str | PathLike[str], dtype: torch.dtype | None = None, *, revision: str | None = None
) -> Any:
    """The model of a checkpoint without its weights, on the device `meta`, for questions that need only shapes.

    No file of weights is read. The default of `dtype` is the one in config.json, else float32. Raises the exceptions of
    `load_model` that concern config.json.
    """
    check_dtype(dtype)
    folder = find_folder(path_or_name, [CONFIG, GENERATION], revision=revision)
    family, keys, described = read_config(folder, None)
    words = {str(each).removeprefix("torch."): each for each in FLOATS}
    stored = keys.word("dtype" if "dtype" in keys else "torch_dtype", words, "float32")
    with torch.device("meta"):
        model = family.build(keys, described).to(dtype or stored)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            module.to(family.dtype(name, parameter.dtype))
    return model.eval()


# Inference tensors cannot be trained later, and they have no version counter, which cross-attention needs to detect
# changed weights.
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

    Weights that are stored in `dtype` stay in the memory-mapped file until they are moved or written to; others are
    converted one at a time. Do not write to the file in place while the model is in use; replacing or deleting it is
    safe.

    Args:
        path_or_name: a folder with config.json and safetensors, or a model's name on the Hub (extra `hub`).
        dtype: dtype of all weights; default: the stored dtype, the widest if there are several.
        device: device of the weights; default: PyTorch's default device.
        length: maximum row length, for rotary scalings that depend on it ("dynamic", "longrope"); default: the
            pretraining length of the model.
        allow_pickle: True reads pytorch_model.bin if there are no safetensors; only tensors are unpickled.
        revision: the branch, tag or commit of a model on the Hub; default: its main branch.

    Raises:
        FileNotFoundError: there is no such folder, and no such model on the Hub, or the Hub cannot be reached.
        ConfigurationError: config.json describes an unsupported or invalid model; names the key and the file.
        FileFormatError: damaged files, files of another format or outside of the folder, or tensors that are missing,
            unknown, of another shape or not finite, with a list.
        ArgumentError: a `dtype` that is not a float, a `length` that is not a whole number from 1, a `revision` of a
            folder, or an argument of another type.
        DeviceError: a `device` that this machine does not have.
    """
    check_dtype(dtype)
    where = checked_device(device)
    if not isinstance(allow_pickle, bool):
        raise ArgumentError(f"allow_pickle: expected True or False, got {allow_pickle!r:.200}")
    folder = find_folder(path_or_name, FILES + PICKLED_FILES if allow_pickle else FILES, revision=revision)
    family, keys, described = read_config(folder, length)
    config = described.config if isinstance(described, Composition) else described
    shards = open_shards(folder, allow_pickle=allow_pickle)
    if config.num_layers > len(shards):
        raise ConfigurationError(
            f"{keys.file}: expected at least one tensor per layer, got num_layers={config.num_layers} and "
            f"{len(shards)} tensors"
        )
    if family.head in shards:
        described = replace(described, tied_embeddings=False)
    with torch.device("meta"), _SkipInitialization():
        model = family.build(keys, described)
    tensors = _match_tensors(keys, family, model, shards)
    if dtype is None and not family.own:
        dtype = _stored_dtype(family, tensors)
    _load_tensors(family, model, tensors, dtype, where)
    return model.eval()


class _SkipInitialization(TorchFunctionMode):
    """Skips random initialisation, because the checkpoint replaces it; it takes half of the time to build a model."""

    _drawing = frozenset({nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_})

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func in self._drawing and "tensor" in kwargs else func(*args, **kwargs)


@dataclass(slots=True)
class _ModelTensor:
    """A tensor of the model: its names there, and its names, layouts and files in the checkpoint (several if tied)."""

    ours: list[str] = field(default_factory=list)
    stored: list[tuple[str, Stored, Shard]] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        name, _, shard = self.stored[0]
        return shard.dtypes[name]  # type: ignore[return-value]  # other dtypes were refused


def _match_tensors(keys: Keys, family: Family, model: nn.Module, shards: dict[str, Shard]) -> list[_ModelTensor]:
    """Matches the model's tensors to the stored ones. Raises FileFormatError, with all differences, if they differ."""
    bare = bool(family.base) and not any(name.startswith(family.base) for name in shards)
    tensors: dict[int, _ModelTensor] = defaultdict(_ModelTensor)
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


def _stored_dtype(family: Family, tensors: list[_ModelTensor]) -> torch.dtype:
    """The widest stored dtype; float16 if only the tensors that stay float32 in a float16 model are wider."""
    others = {entry.dtype for entry in tensors if not family.keeps_float32(entry.ours[0])}
    if others == {torch.float16}:
        return torch.float16
    return reduce(torch.promote_types, {entry.dtype for entry in tensors})


def _load_tensors(
    family: Family, model: nn.Module, tensors: list[_ModelTensor], wanted: torch.dtype | None, device: torch.device
) -> None:
    """Loads the tensors into the model, one at a time, in the dtype `wanted`, by default each in its own.

    Raises FileFormatError, with the names of non-finite tensors.
    """
    wrong: dict[str, Shard] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    converted = 0
    for entry in tensors:
        name, stored, shard = entry.stored[0]
        dtype = entry.dtype if wanted is None else family.dtype(entry.ours[0], wanted)
        source = stored.take(shard.tensor(name))
        for other, layout, its_shard in entry.stored[1:]:
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
        for ours in entry.ours:
            module, _, kind = ours.rpartition(".")
            setattr(modules[module], kind, parameter)
        del source, tensor
        if converted > RELEASE_AFTER_BYTES:
            shard.release()
            converted = 0
    if wrong:
        files, kind = sorted({str(shard.file) for shard in wrong.values()}), f" of {wanted}" if wanted else ""
        raise FileFormatError(f"{', '.join(files)}: expected finite numbers{kind}, got others in {sorted(wrong)}")


def _is_finite(tensor: Tensor) -> bool:
    # The norm is fast and not finite if an element is NaN or Inf. If the norm overflows, all elements are checked.
    return math.isfinite(torch.linalg.vector_norm(tensor).item()) or bool(tensor.isfinite().all())
