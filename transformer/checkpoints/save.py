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

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ConfigurationError
from ..files import sync
from .arguments import check_path
from .documents import Keys
from .families import FAMILIES
from .family import TOKENS, Family
from .folder import CONFIG, GENERATION
from .names import Stored
from .weights import WEIGHTS, import_safetensors


def save_model(model: nn.Module, path: str | PathLike[str], *, shard_bytes: int = 5 * 10**9) -> None:
    """Writes a model into a new folder: config.json, generation_config.json, and its weights as safetensors.

    The format is that of the family that fits the model's configuration, so transformers and `load_model` can load it.
    Dropout is not saved. The folder is written under a temporary name and then renamed, so it is complete or does not
    exist.

    Args:
        model: a model of `transformer.models`, loaded or new.
        path: a folder that does not exist yet, or is empty.
        shard_bytes: maximum bytes of one file of weights; more weights are split into several files.

    Raises FileExistsError if the folder is not empty, ConfigurationError for a model that no family describes (the
    message says how to save it instead), for a wrapper of a model, and for a model whose tensors do not match its
    configuration (as after `to_gqa`, which changes only the attention), and ArgumentError for an invalid `path` or a
    `shard_bytes` that is not a whole number from 1.
    """
    check_path("path", path)
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise ArgumentError(f"shard_bytes: expected a whole number of at least 1, got {shard_bytes!r}")
    # A link to an empty folder stays, and its folder is replaced.
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target}: expected a folder that is new or empty, got a folder with files")
    save_file = import_safetensors().torch.save_file
    family, document = _described(model)
    _check_tensors(family, model)
    tensors = _stored(family, model)
    dtype = next(iter(model.parameters())).dtype
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{secrets.token_hex(16)}.tmp"
    temporary.mkdir()
    try:
        _write_object(temporary / CONFIG, document | {"dtype": str(dtype).removeprefix("torch.")})
        _write_object(temporary / GENERATION, {key: document[key] for key in TOKENS if key in document})
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


OTHER_MODELS = (
    "save any other model with torch.save(model.state_dict(), file): later, build it anew with the same options "
    "(model.config.to_dict()) and load torch.load(file) with load_state_dict"
)

Parts = list[tuple[Stored, Tensor]]
"""Tensors of the model that are stored as one tensor, each with its layout there."""


def _described(model: nn.Module) -> tuple[Family, dict[str, Any]]:
    """The first family whose config.json gives the model's configuration when read again, and that config.json."""
    _check_no_wrapper(model)
    for family in FAMILIES:
        if type(model) is not family.model:
            continue
        config: Any = model.config
        length = getattr(config.rotary_scaling, "length", None)
        try:
            document = json.loads(json.dumps(family.write(config.to_dict())))
            again = family.read(Keys(document, Path(CONFIG), length=length), Keys({}, Path(GENERATION)))
        except ConfigurationError:
            continue
        if _normalized(again) == _normalized(config):
            return family, document
    families = list(dict.fromkeys(family.model_type for family in FAMILIES))
    raise ConfigurationError(
        f"model: expected a model of the families {families} with options that config.json can express, got "
        f"{getattr(model, 'config', type(model).__name__)}; {OTHER_MODELS}"
    )


def _check_no_wrapper(model: object) -> None:
    """Raises ConfigurationError, with the path of the model, for a wrapper of a model (such as torch.compile's)."""
    models = {family.model for family in FAMILIES}
    if not isinstance(model, nn.Module) or type(model) in models:
        return
    for name, module in model.named_modules():
        if type(module) in models:
            raise ConfigurationError(
                f"model: expected a model, got {type(model).__name__}, a wrapper of a {type(module).__name__}; give "
                f"the wrapped model, model.{name}; {OTHER_MODELS}"
            )


def _check_tensors(family: Family, model: nn.Module) -> None:
    """Raises ConfigurationError, with the first difference, unless the tensors match the configuration."""
    with torch.device("meta"):
        described = family.build(Keys({}, Path(CONFIG)), model.config)
    found, expected = (
        {name: list(parameter.shape) for name, parameter in each.named_parameters()} for each in (model, described)
    )
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise ConfigurationError(
                f"model: expected the tensors of its config, and so {name} {expected.get(name, 'not at all')}, got "
                f"{found.get(name, 'none')}; if the model was changed (for example by to_gqa), change its config too: "
                "model.config = dataclasses.replace(model.config, ...)"
            )


def _normalized(config: Any) -> dict[str, Any]:
    """The options of a configuration in a normal form, without dropout."""
    options: dict[str, Any] = config.to_dict()
    head_dim = options["head_dim"] or options["d_model"] // options["num_heads"]
    return options | {
        "attention": config.kv_heads,
        "num_groups": None,
        "head_dim": head_dim,
        "scale": options["scale"] or head_dim**-0.5,
        "out_bias": options["attention_bias"] if options["out_bias"] is None else options["out_bias"],
        "rotary_dim": options["rotary_dim"] or head_dim,
        "layer_pattern": config.layer_kinds,
        "dropout": 0.0,
    }


def _stored(family: Family, model: nn.Module) -> dict[str, Parts]:
    """The model's tensors by their names in a checkpoint; a tied tensor occurs once."""
    tensors: dict[str, Parts] = defaultdict(list)
    for ours, parameter in model.named_parameters():
        name, stored = family.stored_name(ours)
        tensors[name].append((stored, parameter.detach()))
    return tensors


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
