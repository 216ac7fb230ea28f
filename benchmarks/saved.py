"""Saved models: random weights of one shape in a folder, from which each library loads the same model.

Folders are written once in a process and are removed with it.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from transformer.checkpoints import save_model

from .shapes import EncoderModel, Model, SourceModel

Module = TypeVar("Module", bound=nn.Module)
Shape = Model | SourceModel | EncoderModel

_FOLDERS: dict[Shape, Path] = {}


def seeded(build: Callable[[], Module]) -> Module:
    """What `build()` gives, with the same random weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def saved(shape: Shape, build: Callable[[], nn.Module]) -> Path:
    """The folder of the model that `build()` gives, as `save_model` writes it."""
    if shape not in _FOLDERS:
        folder = new_folder()
        save_model(seeded(build), folder)
        _FOLDERS[shape] = folder
    return _FOLDERS[shape]


def with_weights(theirs: Module, folder: Path, prefix: str = "") -> Module:
    """Their model with the weights of the folder, in ordinary memory; their names there begin with `prefix`."""
    weights = {name.removeprefix(prefix): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    found = theirs.load_state_dict(weights, strict=False)
    # What is tied to another weight is not in the file, nor is a pooler, which is not used here.
    tied = "lm_head.weight", "pooler", "encoder.embed_tokens", "decoder.embed_tokens"
    absent = [name for name in found.missing_keys if not name.startswith(tied)]
    if absent or found.unexpected_keys:
        raise ValueError(f"weights: expected the names in the folder, got {absent} but not {found.unexpected_keys}")
    return theirs


def new_folder() -> Path:
    """A path for a folder that is removed at the end of the process."""
    return Path(_root().name) / str(len(list(Path(_root().name).iterdir())))


@cache
def _root() -> "TemporaryDirectory[str]":
    return TemporaryDirectory(prefix="benchmarks-")
