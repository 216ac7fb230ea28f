"""Loading of checkpoints: the configuration, checked key by key, and the tensors, one at a time into a meta model."""

from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from ..cache.snapshot import FLOATS
from ..errors import ArgumentError, ConfigurationError
from ..models import Composition
from .arguments import check_dtype
from .config_file import read_config
from .experts import with_stacked_experts
from .family import Family
from .folder import CONFIG, GENERATION, find_folder
from .model_tensors import ModelTensor, load_tensors, match_tensors, stored_dtype
from .processes import OneProcess, Processes
from .weights import open_shards

FILES = (CONFIG, GENERATION, "tokenizer*.json", "model*.safetensors", "model.safetensors.index.json")
PICKLED_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Additional files for `allow_pickle`. Both are patterns of files that are fetched from the Hub."""


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
    mesh: DeviceMesh | None = None,
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
        mesh: ranks that share the model, one-dimensional, by `parallelize`: each of them makes this call, and reads and
            keeps its part of the tensors alone, on the mesh's device.

    Raises:
        FileNotFoundError: there is no such folder, and no such model on the Hub, or the Hub cannot be reached.
        ConfigurationError: config.json describes an unsupported or invalid model; names the key and the file.
        FileFormatError: damaged files, files of another format or outside of the folder, or tensors that are missing,
            unknown, of another shape or not finite, with a list.
        ArgumentError: a `dtype` that is not a float, a `length` that is not a whole number from 1, a `revision` of a
            folder, or an argument of another type.
        DeviceError: a `device` that this machine does not have, or that is not of the mesh's type.
        RanksError: another rank of the mesh failed; the message has its error.
    """
    processes = _processes(mesh)

    def planned() -> _Plan:
        return _planned(path_or_name, dtype, processes.device(device), length, allow_pickle, revision)

    plan = processes.agreed(planned)
    processes.share(plan.model)
    processes.agreed(lambda: load_tensors(plan.family, plan.model, plan.tensors, plan.dtype, plan.device, processes))
    return plan.model.eval()


def _processes(mesh: DeviceMesh | None) -> Processes:
    if mesh is None:
        return OneProcess()
    # Here, since importing DTensors takes long.
    from .ranks import RanksOfMesh

    return RanksOfMesh(mesh)


@dataclass
class _Plan:
    """A model without weights, the stored tensors that it needs, and the dtype (None: each its own) and device."""

    family: Family
    model: nn.Module
    tensors: list[ModelTensor]
    dtype: torch.dtype | None
    device: torch.device


def _planned(
    path_or_name: str | PathLike[str],
    dtype: torch.dtype | None,
    device: torch.device,
    length: int | None,
    allow_pickle: bool,
    revision: str | None,
) -> _Plan:
    """Reads config.json and the headers of the files. Raises as `load_model` does."""
    check_dtype(dtype)
    if not isinstance(allow_pickle, bool):
        raise ArgumentError(f"allow_pickle: expected True or False, got {allow_pickle!r:.200}")
    folder = find_folder(path_or_name, FILES + PICKLED_FILES if allow_pickle else FILES, revision=revision)
    family, keys, described = read_config(folder, length)
    config = described.config if isinstance(described, Composition) else described
    shards = with_stacked_experts(family, open_shards(folder, allow_pickle=allow_pickle))
    if config.num_layers > len(shards):
        raise ConfigurationError(
            f"{keys.file}: expected at least one tensor per layer, got num_layers={config.num_layers} and "
            f"{len(shards)} tensors"
        )
    if family.head in shards:
        described = replace(described, tied_embeddings=False)
    with torch.device("meta"), _SkipInitialization():
        model = family.build(keys, described)
    tensors = match_tensors(keys, family, model, shards)
    if dtype is None and not family.own:
        dtype = stored_dtype(family, tensors)
    return _Plan(family, model, tensors, dtype, device)


class _SkipInitialization(TorchFunctionMode):
    """Skips random initialisation, because the checkpoint replaces it; it takes half of the time to build a model."""

    _drawing = frozenset({nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_})

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func in self._drawing and "tensor" in kwargs else func(*args, **kwargs)
