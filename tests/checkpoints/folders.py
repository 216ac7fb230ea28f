"""Small checkpoints for tests, and ways to damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from transformer import DecoderOnlyTransformer
from transformer.checkpoints import save_model


def small_model(**options: object) -> DecoderOnlyTransformer:
    torch.manual_seed(0)
    return DecoderOnlyTransformer(11, 8, 2, 12, 2, tied_embeddings=False, **options).eval()


def small_folder(path: Path, *, shards: bool = False) -> Path:
    save_model(small_model(), path, shard_bytes=1500 if shards else 10**9)
    return path


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
