"""Checkpoints of models that ranks share: each rank reads its part alone, and rank 0 writes what one process would."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from tests.checkpoints.folders import edit_tensors
from tests.ranks import on_ranks
from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer
from transformer.checkpoints import load_model, save_model
from transformer.checkpoints.weights import PickledShard, SafetensorsShard
from transformer.errors import ArgumentError, DeviceError, FileFormatError, RanksError
from transformer.models import EncoderTransformer, UMT5Config, UMT5Model
from transformer.parallel import parallelize

VOCAB = 61
"""No number of ranks divides it."""

GPT2 = {
    "position": "learned",
    "max_length": 32,
    "norm": "layer",
    "feed_forward": "plain",
    "feed_forward_bias": True,
    "attention_bias": True,
    "activation": "gelu_tanh",
}
NEOX = {"norm": "layer", "feed_forward": "plain", "feed_forward_bias": True, "attention_bias": True}
BART = {
    **GPT2,
    "activation": "gelu",
    "position_offset": 2,
    "norm_eps": 1e-5,
    "norm_placement": "after",
    "embedding_norm": True,
    "head_bias": True,
    "shared_embeddings": True,
    "start_token": 2,
}
CASES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: decoder(attention="gqa", num_groups=4, tied_embeddings=False),
    "llama, tied": lambda: decoder(tied_embeddings=True),
    "qwen3": lambda: decoder(attention="gqa", num_groups=4, qk_norm=True, window_size=7),
    "gpt2": lambda: decoder(**GPT2, tied_embeddings=True),
    "gpt_neox": lambda: decoder(**NEOX, residual="parallel", tied_embeddings=False),
    "falcon": lambda: decoder(**NEOX, residual="parallel", attention="gqa", num_groups=4),
    "native, alibi": lambda: decoder(position="alibi", softcap=5.0, logit_scale=0.5),
    "native, relative": lambda: decoder(position="relative", qk_norm=True),
    "bart": lambda: EncoderDecoderTransformer(VOCAB, VOCAB, 32, 8, 48, 2, **BART),
    "encoder-decoder": lambda: EncoderDecoderTransformer(VOCAB, VOCAB, 32, 8, 48, 2, position="relative"),
    "umt5": lambda: UMT5Model(UMT5Config(vocab_size=VOCAB, d_model=32, num_heads=8, head_dim=6, d_ff=48, num_layers=2)),
    "encoder": lambda: EncoderTransformer(VOCAB, 32, 8, 48, 2),
}


def decoder(**options: object) -> DecoderOnlyTransformer:
    return DecoderOnlyTransformer(VOCAB, 32, 8, 48, 2, **options)


def filled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()


def locals_of(model: nn.Module) -> dict[str, tuple[object, Tensor]]:
    return {
        name: (each.placements, each.to_local()) if isinstance(each, DTensor) else ((), each)
        for name, each in model.named_parameters(remove_duplicate=False)
    }


def assert_same_model(found: nn.Module, expected: nn.Module) -> None:
    assert [type(each) for each in found.modules()] == [type(each) for each in expected.modules()]
    assert not found.training
    ours, theirs = locals_of(found), locals_of(expected)
    assert ours.keys() == theirs.keys()
    for name, (placements, tensor) in theirs.items():
        assert ours[name][0] == placements, name
        assert ours[name][1].dtype == tensor.dtype, name
        assert torch.equal(ours[name][1], tensor), name
    groups = [[id(each) for each in model.parameters()] for model in (found, expected)]
    assert len(groups[0]) == len(groups[1])  # what is tied is one parameter
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in found.parameters())


def allocated(model: nn.Module) -> int:
    """Bytes of the memory that a model's tensors keep."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for _, each in locals_of(model).values()}
    return sum(storage.nbytes() for storage in storages.values())


def share_of(model: nn.Module) -> int:
    """Bytes of this rank's part of each parameter."""
    unique = {id(each): each for each in model.parameters()}
    return sum((each.to_local() if isinstance(each, DTensor) else each).nbytes for each in unique.values())


@contextmanager
def bytes_read(monkeypatch: pytest.MonkeyPatch):
    """The bytes of each region that is read, of files of both kinds. Parts of one stored tensor read the same rows."""
    counted: dict[tuple, int] = {}
    for kind in (SafetensorsShard, PickledShard):
        original = kind.part

        def part(self, name, region, original=original, **options):
            tensor = original(self, name, region, **options)
            counted[self.file, name, str(region)] = tensor.nbytes
            return tensor

        monkeypatch.setattr(kind, "part", part)
    yield counted
    monkeypatch.undo()


def load_and_save(rank: int, folder: Path, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))
    monkeypatch = pytest.MonkeyPatch()
    ids = torch.arange(20).view(2, 10)
    for case in CASES:
        place = folder / case
        expected = parallelize(load_model(place), mesh)
        with bytes_read(monkeypatch) as counted:
            found = load_model(place, mesh=mesh)
        assert_same_model(found, expected)
        share = share_of(found)
        assert allocated(found) <= 1.1 * share, case
        # A tied tensor can stand in a file twice.
        assert 0 < sum(counted.values()) <= 1.1 * share, case
        assert share < 0.62 * sum(tensor.nbytes for tensor in load_file(place / "model.safetensors").values()), case
        assert_same_model(
            load_model(place, torch.bfloat16, "cpu", mesh=mesh), parallelize(load_model(place, torch.bfloat16), mesh)
        )

        save_model(found, folder / f"{case} again", shard_bytes=20_000)
        if rank == 0:
            assert contents(folder / f"{case} again") == contents(folder / f"{case} in shards")
        for other in ("in shards", "pickled"):
            if (folder / f"{case} {other}").exists():
                assert_same_model(load_model(folder / f"{case} {other}", allow_pickle=True, mesh=mesh), expected)
        if isinstance(found, DecoderOnlyTransformer):
            with torch.no_grad():
                assert torch.equal(found(ids), expected(ids))
    refuse(rank, folder, mesh)


def refuse(rank: int, folder: Path, mesh: DeviceMesh) -> None:
    place, is_last = folder / "llama", rank == mesh.size() - 1
    with pytest.raises(ArgumentError, match="mesh: expected"):
        load_model(place, mesh="cpu")
    with pytest.raises(DeviceError, match="device: expected"):
        load_model(place, device="cuda:99", mesh=mesh)

    # A number of the last rank alone is not finite.
    with pytest.raises(FileFormatError if is_last else RanksError, match=r"expected finite numbers.*q_proj"):
        load_model(folder / "spoilt", mesh=mesh)
    # A file that only one rank does not have.
    with pytest.raises(FileNotFoundError if is_last else RanksError, match="nowhere"):
        load_model(folder / "nowhere" if is_last else place, mesh=mesh)

    model = load_model(place, mesh=mesh)
    with pytest.raises(FileExistsError if rank == 0 else RanksError, match="expected a folder that is new or empty"):
        save_model(model, place)
    with pytest.raises(ArgumentError if is_last else RanksError, match="shard_bytes"):
        save_model(model, folder / "new", shard_bytes=0 if is_last else 10**9)
    monkeypatch, synced = pytest.MonkeyPatch(), []

    def fail_at_fourth(_: int) -> None:
        synced.append(1)
        if len(synced) == 4:
            raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail_at_fourth)
    with pytest.raises(OSError if rank == 0 else RanksError, match="disk full"):
        save_model(model, folder / "new", shard_bytes=20_000)
    monkeypatch.undo()
    assert len(synced) == (4 if rank == 0 else 0)
    dist.barrier()
    assert not [each for each in folder.iterdir() if each.name.startswith((".", "new"))]
    dist.barrier()
    save_model(model, folder / "new")
    assert contents(folder / "new") == contents(place)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def written(folder: Path) -> Path:
    """The models of all cases, each in a folder, in shards, and some as pickles."""
    for case, make in CASES.items():
        model = filled(make())
        save_model(model, folder / case)
        save_model(model, folder / f"{case} in shards", shard_bytes=20_000)
    for case in ("gpt2", "llama, tied"):
        place = folder / f"{case} pickled"
        save_model(load_model(folder / case), place)
        torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
        (place / "model.safetensors").unlink()
    save_model(load_model(folder / "llama"), folder / "spoilt")
    edit_tensors(
        folder / "spoilt", lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"][-1].fill_(torch.nan)
    )
    return folder


def test_two_ranks_read_their_parts_and_write_the_whole(tmp_path: Path) -> None:
    on_ranks(2, load_and_save, written(tmp_path), 2)


@pytest.mark.slow
def test_four_ranks_read_their_parts_and_write_the_whole(tmp_path: Path) -> None:
    on_ranks(4, load_and_save, written(tmp_path), 4)
