"""Saving of a model as a checkpoint in the format of Hugging Face, atomically."""

import json
import os
import secrets
import shutil
import stat
from collections import defaultdict
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..cache.snapshot import FLOATS
from ..errors import ArgumentError, ConfigurationError
from ..files import sync
from ..models import DecoderOnlyTransformer, parameters_by_name
from .arguments import check_path
from .description import described_as
from .family import Family
from .folder import CONFIG, GENERATION
from .names import Stored
from .weights import WEIGHTS, import_safetensors


def save_model(model: nn.Module, path: str | PathLike[str], *, shard_bytes: int = 5 * 10**9) -> None:
    """Writes a model into a new folder: config.json, generation_config.json, and its weights as safetensors.

    A decoder-only model is described by its modules as they are, also after `to_gqa` or a new `window_size` of a layer;
    another model by its configuration, also after `to_gqa`.
    The format is that of the first family of published models that fits, which transformers reads as well, without
    dropout; else `modular_attention`, which engines read with `transformer.engines` imported; else
    `modular_attention_native`, which only `load_model` reads. These two have every option, also dropout.
    The folder is written under a temporary name and then renamed, so it is complete or does not exist.

    Args:
        model: a model of `transformer.models`, loaded or new.
        path: a folder that does not exist yet, or is empty.
        shard_bytes: maximum bytes of one file of weights; more weights are split into several files.

    Raises FileExistsError if the folder is not empty, ConfigurationError for a wrapper of a model, for a model with
    modules or tensors that no options describe (the message says how to save it instead) and for tensors that are not
    plain floats (quantised, sharded, on meta), and ArgumentError for an invalid `path` or a `shard_bytes` that is not a
    whole number from 1.
    """
    check_path("path", path)
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise ArgumentError(f"shard_bytes: expected a whole number of at least 1, got {shard_bytes!r}")
    # A link to an empty folder stays, and its folder is replaced.
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target}: expected a folder that is new or empty, got a folder with files")
    save_file = import_safetensors().torch.save_file
    family, document = described_as(model)
    tensors = _stored(family, model)
    dtype = next(iter(model.parameters())).dtype
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{secrets.token_hex(16)}.tmp"
    temporary.mkdir()
    try:
        _write_object(temporary / CONFIG, document | {"dtype": str(dtype).removeprefix("torch.")})
        _write_object(temporary / GENERATION, family.generation(document))
        shards = list(_shards(tensors, shard_bytes))
        places: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            name = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file({each: _joined(tensors[each]) for each in names}, temporary / name, {"format": "pt"})
            # safetensors writes with a mode for the owner only; all files get the same mode.
            os.chmod(temporary / name, stat.S_IMODE((temporary / CONFIG).stat().st_mode))
            places |= dict.fromkeys(names, name)
            sync(temporary / name)
        if len(shards) > 1:
            total = sum(_nbytes(parts) for parts in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": places}
            _write_object(temporary / f"{WEIGHTS}.index.json", index)
        sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(target.parent)


Parts = list[tuple[Stored, Tensor]]
"""Tensors of the model that are stored as one tensor, each with its layout there."""


def _stored(family: Family, model: nn.Module) -> dict[str, Parts]:
    """The model's tensors by their names in a checkpoint; a tied tensor occurs once."""
    tensors: dict[str, Parts] = defaultdict(list)
    by_name = parameters_by_name(model) if isinstance(model, DecoderOnlyTransformer) else dict(model.named_parameters())
    for ours, parameter in by_name.items():
        _check_plain(ours, parameter)
        name, stored = family.stored_name(ours)
        tensors[name].append((stored, parameter.detach()))
    return tensors


def _check_plain(name: str, parameter: Tensor) -> None:
    """Raises ConfigurationError for a tensor that no file of floats can hold as it is."""
    kind = type(parameter.data)  # a class of its own where weights are packed, fake, or sharded over processes
    if kind is not Tensor or parameter.is_meta or parameter.dtype not in FLOATS:
        raise ConfigurationError(
            f"model: expected float tensors with data, got {name} as {kind.__name__} of {parameter.dtype} on "
            f"{parameter.device}; load the model without quantisation, gather shards, and give empty tensors their "
            "weights first"
        )


def _joined(parts: Parts) -> Tensor:
    ordered = sorted(parts, key=lambda part: part[0].part)
    return ordered[0][0].join([tensor for _, tensor in ordered]).cpu()


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


def _write_object(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    sync(file)
