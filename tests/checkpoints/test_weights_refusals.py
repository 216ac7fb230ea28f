"""Malicious and damaged files of tensors: refused by name, without access outside of the folder."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints.folders import edit_config, edit_index, edit_tensors
from transformer.checkpoints import empty_model, generation_defaults, load_config, load_model, load_tokenizer
from transformer.errors import ArgumentError, AttentionError, FileFormatError

Q, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"


COMMIT = "0123456789" * 4


class Sentinel:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.file),)


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.self_attn.query.weight"] = tensors.pop(Q)


def drop_two(tensors: dict[str, Tensor]) -> None:
    del tensors[Q], tensors[DOWN]


def misshape(tensors: dict[str, Tensor]) -> None:
    tensors[Q], tensors[DOWN] = tensors[Q][:4].clone(), tensors[DOWN].t().contiguous()


def more_layers(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.self_attn.q_proj.weight"] = torch.ones(8, 8)


def whole_numbers(tensors: dict[str, Tensor]) -> None:
    tensors[Q] = torch.ones(8, 8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename, [f"missing: {Q}", "unknown: model.layers.1.self_attn.query.weight"]),
        (drop_two, [f"missing: {DOWN}, {Q}"]),
        (misshape, [f"misshapen: {DOWN} [12, 8]", "instead of [8, 12]", f"{Q} [4, 8]", "instead of [8, 8]"]),
        (more_layers, ["unknown: model.layers.2.self_attn.q_proj.weight"]),
        (whole_numbers, [f"misshapen: {Q}", "I32 instead of"]),
        (dict.clear, ["tensors"]),
    ],
)
def test_other_tensors_are_refused_and_listed(folder: Path, change: Callable, said: list[str]) -> None:
    edit_tensors(folder, change)
    with pytest.raises(AttentionError) as raised:
        load_model(folder)
    assert str(folder) in str(raised.value)
    assert [part for part in said if part not in str(raised.value)] == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_and_listed(folder: Path, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[Q][3, 2] = tensors["model.norm.weight"][-1] = value

    edit_tensors(folder, spoil)
    with pytest.raises(FileFormatError, match=r"model\.safetensors: .*finite.*" + f"{Q}.*model.norm.weight"):
        load_model(folder)


def test_numbers_too_large_for_the_dtype_are_refused(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors[Q].fill_(1e30))
    assert load_model(folder, torch.bfloat16).config.d_model == 8
    with pytest.raises(FileFormatError, match=f"finite numbers of torch.float16, .*{Q}"):
        load_model(folder, torch.float16)


def test_large_numbers_whose_sum_overflows_are_no_reason(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({n: t.half().fill_(6e4) for n, t in tensors.items()}))
    assert all((parameter == 6e4).all() for parameter in load_model(folder).parameters())


def test_a_head_that_is_said_to_be_tied_and_is_not(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(FileFormatError, match=r"model.embed_tokens.weight and lm_head.weight to be the same"):
        load_model(folder)
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"].copy_(tensors["model.embed_tokens.weight"]))
    model = load_model(folder)
    assert model.head.proj.weight is model.embedding.tokens.weight


def test_a_file_cut_at_any_place_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for size in [*range(0, 40, 3), *range(40, len(content), 499), len(content) - 1]:
        file.write_bytes(content[:size])
        with pytest.raises(FileFormatError, match=str(file)):
            load_model(folder)
    file.write_bytes(content + b"\0" * 8)
    with pytest.raises(FileFormatError, match=str(file)):
        load_model(folder)


def test_a_flipped_bit_in_the_header_is_refused_or_changes_nothing(folder: Path) -> None:
    file = folder / "model.safetensors"
    content, weights = file.read_bytes(), load_model(folder).state_dict()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in random.Random(0).sample(range(8 * header), 250):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        file.unlink()
        file.write_bytes(changed)
        refused = ""
        try:
            read = load_model(folder).state_dict()
        except FileFormatError as error:
            refused = str(error)
        assert str(folder) in refused or all(torch.equal(tensor, weights[name]) for name, tensor in read.items())


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\0b", ".x"])
def test_an_index_reaches_no_other_folder(sharded: Path, name: str) -> None:
    shutil.copy(min(sharded.glob("*.safetensors")), sharded.parent / "model.safetensors")
    edit_index(sharded, lambda index: index["weight_map"].update({Q: name}))
    with pytest.raises(FileFormatError, match="names of files in this folder"):
        load_model(sharded)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_links_out_of_the_folder_are_refused(folder: Path, name: str) -> None:
    elsewhere = folder.parent / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(FileFormatError, match=f"{folder / name}.*link to {elsewhere}"):
        load_model(folder)


def test_links_within_the_folder_and_to_the_folder_are_followed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (folder.parent / "link").symlink_to(folder)
    assert load_model(folder.parent / "link").config == load_model(folder).config


def test_the_layout_of_the_hubs_cache_is_read(folder: Path) -> None:
    cache = folder.parent / "models--owner--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    snapshot = folder.rename(cache / "snapshots" / COMMIT)
    for file in list(snapshot.iterdir()):
        file.rename(cache / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    assert load_model(snapshot).config.d_model == 8


NOT_THE_HUBS = {
    "snapshots": "a short commit",
    "models--owner--name/snapshots": "no commit",
    f"owner/snapshots/{COMMIT}": "no folder of a model",
    f"models--owner--name/other/{COMMIT}": "no snapshots",
}


@pytest.mark.parametrize("place", [*NOT_THE_HUBS, f"models--owner--name/snapshots/{COMMIT}"])
@pytest.mark.parametrize(
    "target", ["secret", "../secret", "../../secret", "../../refs/secret", "../../blobs/in/secret"]
)
def test_links_lead_to_the_blobs_of_the_hubs_cache_alone(folder: Path, place: str, target: str) -> None:
    home = folder.parent / "home"
    (home / place).parent.mkdir(parents=True)
    moved = folder.rename(home / place)
    secret = moved / ".." / target
    secret.parent.mkdir(parents=True, exist_ok=True)
    (moved / "config.json").rename(secret)
    (moved / "config.json").symlink_to(secret.resolve())
    with pytest.raises(FileFormatError, match=f"{moved / 'config.json'}: expected a file in its own folder"):
        load_model(moved)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["loop", "pipe", "folder", "socket"])
def test_what_is_no_file_is_refused(folder: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / name
    file.unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        match kind:
            case "loop":
                file.symlink_to(file)
            case "pipe":
                os.mkfifo(file)
            case "folder":
                file.mkdir()
            case "socket":
                monkeypatch.chdir(folder)  # its path may not be long
                listening.bind(name)
        with pytest.raises(FileFormatError, match=f"{file}: expected"):
            load_model(folder)


def header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def changed(whole: bytes) -> bytes:
        size = int.from_bytes(whole[:8], "little")
        found = json.loads(whole[8 : 8 + size])
        text = change(found)
        text = (text if isinstance(text, str) else json.dumps(found)).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + size :]

    return changed


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "a name twice": header(lambda found: json.dumps(found)[:-1] + f', "{Q}": {json.dumps(found[Q])}}}'),
    "a key twice": header(lambda found: json.dumps(found).replace('"dtype"', '"dtype": "F32", "dtype"', 1)),
    "a list": header(lambda found: "[]"),
    "very deep": header(lambda found: "[" * 100_000),
    "a huge number": header(lambda found: "9" * 5000),
    "too long": lambda whole: (1 << 27).to_bytes(8, "little") + whole[8:],
    "beyond the file": lambda whole: (len(whole)).to_bytes(8, "little") + whole[8:],
    "of no bytes": lambda whole: bytes(8) + whole[8:],
    "of 2**63 bytes": lambda whole: (1 << 63).to_bytes(8, "little") + whole[8:],
    "no UTF-8": lambda whole: whole[:8] + b"\xff" + whole[9:],
    "an unknown shape": header(lambda found: found[Q].update(shape=[2**62, 2**62])),
    "no offsets": header(lambda found: found[Q].pop("data_offsets")),
    "an overlap": header(lambda found: found[Q].update(data_offsets=found[DOWN]["data_offsets"])),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_are_refused_before_anything_is_read(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(HEADERS[name](file.read_bytes()))
    with pytest.raises(FileFormatError, match=f"^{file}: expected"):
        load_model(folder)


def test_of_many_names_an_error_lists_some(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({f"more.{i}": torch.zeros(0) for i in range(20_000)}))
    with pytest.raises(FileFormatError, match=r"unknown: more\.0, .* and 19,950 more$") as raised:
        load_model(folder)
    assert len(str(raised.value)) < 2000


@pytest.mark.parametrize("odd", [torch.ones(2, 2).to_sparse(), torch.empty(8, 8, device="meta")])
def test_pickled_tensors_that_are_not_plain_are_refused(folder: Path, odd: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors | {Q: odd}, folder / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match=f"pytorch_model.bin: expected tensors of plain numbers, got others: {Q}"):
        load_model(folder, allow_pickle=True)


@pytest.mark.parametrize("name", ["a" * 5000 + ".safetensors", "a" * 300 + ".safetensors", "é" * 200 + ".safetensors"])
def test_an_index_of_very_long_names(sharded: Path, name: str) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({Q: name}))
    with pytest.raises(FileFormatError, match=str(sharded)) as raised:
        load_model(sharded)
    assert len(str(raised.value)) < 2000


# --- folders of this machine and models of the Hub ------------------------------------------------------------------

LOADS = [load_config, empty_model, load_model, load_tokenizer, generation_defaults]


@pytest.mark.parametrize("load", LOADS)
def test_a_revision_is_asked_of_the_hub(folder: Path, load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_config(folder, vocab_size=256)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append((name, options)) or str(folder)
    )
    with contextlib.suppress(FileFormatError):  # the vocabulary is another one now
        load("owner/name", revision="v1.0")
    with contextlib.suppress(FileFormatError):
        load("owner/name")
    assert [(name, options["revision"]) for name, options in asked] == [("owner/name", "v1.0"), ("owner/name", None)]


@pytest.mark.parametrize("load", LOADS)
def test_a_folder_has_no_revisions(folder: Path, load: Callable) -> None:
    with pytest.raises(ArgumentError, match=f"revision: expected None for the folder {folder}.*got 'main'"):
        load(folder, revision="main")
    for revision in ("", 1, b"main"):
        with pytest.raises(ArgumentError, match="revision: expected None or the name"):
            load("owner/name", revision=revision)


def test_an_unknown_revision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="owner/name, revision v9: expected"):
        load_config("owner/name", revision="v9")


def test_a_folder_that_is_taken_before_a_model_of_the_hub_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileFormatError, match="without it; a folder has precedence"):
        load_config("owner/model")


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "a/" * 3000])
def test_a_name_that_no_folder_can_have(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="expected the folder of a checkpoint") as raised:
        load_config(name)
    assert len(str(raised.value)) < 7000


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("weight_map"),
        lambda index: index.update(weight_map=[1]),
        lambda index: index["weight_map"].update({Q: 3}),
        lambda index: index["weight_map"].update({Q: "config.json"}),
        lambda index: index["weight_map"].update({Q: "no-such.safetensors"}),
        lambda index: index["weight_map"].update({Q: index["weight_map"]["lm_head.weight"]}),
        lambda index: index["weight_map"].pop(Q),
        lambda index: index["weight_map"].update({"more": index["weight_map"][Q]}),
    ],
)
def test_an_index_that_says_something_else_is_refused(sharded: Path, change: Callable) -> None:
    edit_index(sharded, change)
    with pytest.raises(FileFormatError, match=str(sharded)):
        load_model(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    first, last = (sharded / index["weight_map"][name] for name in ("model.embed_tokens.weight", "lm_head.weight"))
    both = {name: tensor.clone() for file in (first, last) for name, tensor in load_file(file).items()}
    save_file(both, last)
    with pytest.raises(FileFormatError, match=r"each tensor once"):
        load_model(sharded)


def test_pickles_are_not_read_unless_asked_for(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match=f"{folder}.*allow_pickle=True"):
        load_model(folder)
    model = load_model(folder, allow_pickle=True)
    assert torch.equal(model.head.proj.weight, tensors["lm_head.weight"])


@pytest.mark.parametrize("archive", [True, False])
def test_pickles_run_nothing(folder: Path, archive: bool) -> None:
    sentinel = folder.parent / "sentinel"
    (folder / "model.safetensors").unlink()
    if archive:
        torch.save({"lm_head.weight": Sentinel(sentinel)}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Sentinel(sentinel)))
    with pytest.raises(FileFormatError, match=str(folder / "pytorch_model.bin")):
        load_model(folder, allow_pickle=True)
    assert not sentinel.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: torch.ones(1)}, torch.ones(2)])
def test_pickles_of_something_else_are_refused(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match=f"{folder / 'pytorch_model.bin'}: expected tensors by name"):
        load_model(folder, allow_pickle=True)


def test_pickled_shards(sharded: Path) -> None:
    weights = load_model(sharded).state_dict()
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    for file in sharded.glob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    index["weight_map"] = {name: Path(file).with_suffix(".bin").name for name, file in index["weight_map"].items()}
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (sharded / "model.safetensors.index.json").unlink()
    read = load_model(sharded, allow_pickle=True).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read.items())
