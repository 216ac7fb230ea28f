"""Saving of a model as a checkpoint in the format of Hugging Face, atomically."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..cache.snapshot import FLOATS
from ..errors import ArgumentError, ConfigurationError
from ..models import DecoderOnlyTransformer, parameters_by_name
from .arguments import check_path
from .description import described_as
from .family import Family
from .folder import CONFIG, GENERATION
from .names import Stored
from .new_folder import NewFolder
from .processes import OneProcess, Processes
from .weights import WEIGHTS, import_safetensors


def save_model(model: nn.Module, path: str | PathLike[str], *, shard_bytes: int = 5 * 10**9) -> None:
    """Writes a model into a new folder: config.json, generation_config.json, and its weights as safetensors.

    A decoder-only model is described by its modules as they are, also after `to_gqa` or a new `window_size` of a layer;
    another model by its configuration, also after `to_gqa`.
    The format is that of the first family of published models that fits, which transformers reads as well, without
    dropout; else `modular_attention`, which engines read with `transformer.engines` imported; else
    `modular_attention_native`, which only `load_model` reads. These two have every option, also dropout.
    The folder is written under a temporary name and then renamed, so it is complete or does not exist. Every rank of a
    parallel model makes this call; rank 0 writes what one process would, and holds one file of weights meanwhile.

    Args:
        model: a model of `transformer.models`, loaded or new.
        path: a folder that does not exist yet, or is empty.
        shard_bytes: maximum bytes of one file of weights; more weights are split into several files.

    Raises FileExistsError if the folder is not empty, ConfigurationError for a wrapper of a model, for a model with
    modules or tensors that no options describe (the message says how to save it instead) and for tensors that are not
    plain floats (quantised, sharded, on meta), and ArgumentError for an invalid `path` or a `shard_bytes` that is not a
    whole number from 1. Ranks of a parallel model raise RanksError where another one of them failed.
    """
    processes = _processes_of(model)
    plan = processes.agreed(lambda: _planned(model, path, shard_bytes, processes))
    folder = NewFolder(path)
    try:
        processes.first(folder.make)
        for name, document in plan.documents.items():
            processes.first(partial(folder.add_object, name, document))
        for name, names in plan.files.items():
            # Tensor by tensor, over all processes; only the first one keeps them, until the file is written.
            joined = {each: _joined(plan.tensors[each], processes) for each in names}
            kept = {each: tensor for each, tensor in joined.items() if tensor is not None}
            processes.first(partial(folder.add_tensors, name, kept))
        processes.first(folder.publish)
    except BaseException:
        folder.remove()
        raise


def _processes_of(model: object) -> Processes:
    """The processes that have the parameters of a model."""
    if not isinstance(model, nn.Module) or all(type(parameter.data) is Tensor for parameter in model.parameters()):
        return OneProcess()
    # Here, since importing DTensors takes long.
    from .ranks import processes_of

    return processes_of(model)


Parts = list[tuple[Stored, Tensor]]
"""Parameters of the model, or those of one expert, that are stored as one tensor, each with its layout there."""


class _Plan(NamedTuple):
    """The JSON files by name, the tensors by name, and the names of the tensors in each file of weights."""

    documents: dict[str, dict[str, Any]]
    tensors: dict[str, Parts]
    files: dict[str, list[str]]


def _planned(model: nn.Module, path: str | PathLike[str], shard_bytes: int, processes: Processes) -> _Plan:
    """The content of the folder. Raises as `save_model` does, for all but the folder."""
    check_path("path", path)
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise ArgumentError(f"shard_bytes: expected a whole number of at least 1, got {shard_bytes!r}")
    import_safetensors()
    whole = processes.whole_model(model)
    family, document = described_as(whole)
    tensors = _stored(family, whole, processes)
    dtype = str(next(iter(model.parameters())).dtype).removeprefix("torch.")
    documents = {CONFIG: document | {"dtype": dtype}, GENERATION: family.generation(document)}
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        return _Plan(documents, tensors, {WEIGHTS: shards[0]})
    files = {f"model-{number:05}-of-{len(shards):05}.safetensors": names for number, names in enumerate(shards, 1)}
    documents[f"{WEIGHTS}.index.json"] = {
        "metadata": {"total_size": sum(map(_nbytes, tensors.values()))},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    return _Plan(documents, tensors, files)


def _stored(family: Family, model: nn.Module, processes: Processes) -> dict[str, Parts]:
    """The model's tensors by their names in a checkpoint; a tied tensor occurs once."""
    tensors: dict[str, Parts] = defaultdict(list)
    by_name = parameters_by_name(model) if isinstance(model, DecoderOnlyTransformer) else dict(model.named_parameters())
    for ours, parameter in by_name.items():
        _check_plain(ours, processes.own(parameter))
        name, stored = family.stored_name(ours)
        for each, tensor in stored.slices(name, parameter):
            tensors[each].append((stored, tensor))
    return tensors


def _check_plain(name: str, tensor: Tensor) -> None:
    """Raises ConfigurationError for a tensor that no file of floats can hold as it is."""
    kind = type(tensor)  # a class of its own where weights are packed, fake, or sharded over processes
    if kind is not Tensor or tensor.is_meta or tensor.dtype not in FLOATS:
        raise ConfigurationError(
            f"model: expected float tensors with data, got {name} as {kind.__name__} of {tensor.dtype} on "
            f"{tensor.device}; load the model without quantisation, gather shards, and give empty tensors their "
            "weights first"
        )


def _joined(parts: Parts, processes: Processes) -> Tensor | None:
    """The stored tensor, in the first process; None in the others."""
    ordered = sorted(parts, key=lambda part: part[0].part)
    tensors = [tensor for _, parameter in ordered if (tensor := processes.gathered(parameter)) is not None]
    return ordered[0][0].join(tensors).cpu() if tensors else None


def _nbytes(parts: Parts) -> int:
    return sum(tensor.nbytes for _, tensor in parts)


def _shards(tensors: dict[str, Parts], shard_bytes: int) -> Iterator[list[str]]:
    """The names of the tensors of each file."""
    names: list[str] = []
    size = 0
    for name, parts in tensors.items():
        if names and size + _nbytes(parts) > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += _nbytes(parts)
    yield names
