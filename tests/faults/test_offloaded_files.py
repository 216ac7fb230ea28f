"""Files of waiting conversations that are lost or damaged: refused by name, and nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.blocks.stacks import MIXED, cache_snapshots, make
from tests.cache.offloaded import RAGGED, fed, step
from tests.oracle import Options
from tests.setups import build, tokens
from transformer import KVCache
from transformer.errors import (
    CacheStateError,
    FileFormatError,
)


def lost(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def other(path: Path) -> None:
    """Another conversation, of the same size."""
    stack, size = make(MIXED), path.stat().st_size
    with torch.no_grad():
        stack(tokens(2, 5, 16, seed=1), attention_mask=RAGGED)
        stack(tokens(2, 2, 16, seed=8))
    KVCache.from_model(stack).save(path)
    assert path.stat().st_size == size


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [lost, folder, cut, other, flipped])
def test_it_waits_until_its_file_is_put_back(damage: Callable[[Path], None], tmp_path: Path) -> None:
    """Refused by the name of the file, again and again, and with nothing lost."""
    clean, _ = fed()
    stack, cache = fed()
    path = tmp_path / "chat"
    cache.offload(path)
    whole = path.read_bytes()
    damage(path)
    kind = CacheStateError if damage is lost else FileFormatError
    for operation in (
        lambda: step(stack),
        lambda: step(stack),
        cache.fork,
        lambda: cache.select([0]),
    ):
        with pytest.raises(kind, match=str(path)) as raised:
            operation()
        assert damage is folder or "put th" in str(raised.value)
        assert (cache.length, cache.batch, cache.lengths.tolist()) == (7, 2, [7, 5])
    if damage is folder:
        path.rmdir()
    path.write_bytes(whole)
    assert torch.equal(step(stack), step(clean))
    assert cache_snapshots(stack) == cache_snapshots(clean)


def test_every_changed_byte_of_its_tensors_is_noticed(tmp_path: Path) -> None:
    module = build(Options(num_groups=1, window_size=3, num_sinks=1), "MQA")
    with torch.no_grad():
        module(tokens(1, 4, 16))
    path, cache = tmp_path / "layer", module.kv_cache
    cache.offload(path)
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    assert len(whole) - begin > 200
    for place in range(begin, len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=str(path)):
            cache["key"]
    path.write_bytes(whole)
    assert cache["key"].shape == (1, 1, 4, 4)


def test_a_conversation_whose_file_is_lost_can_be_forgotten(tmp_path: Path) -> None:
    stack, cache = fed()
    cache.offload(tmp_path / "chat")
    (tmp_path / "chat").unlink()
    cache.clear()
    assert torch.equal(step(stack), step(make(MIXED)))


def test_the_working_directory_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stack, cache = fed()
    cache.offload("chat")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    step(stack)
