"""Damaged files, and files of another format or model: refused by name, without changes."""

from __future__ import annotations

import json
import math
import os
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.blocks.stacks import MIXED, READERS, Layer, cache_snapshots, make
from tests.setups import tokens
from transformer import KVCache, LayerCache
from transformer.blocks import BlockStack
from transformer.errors import ArgumentError, FileFormatError

LAYERS = (READERS[1], READERS[2])
"""One that sees everything, one with a window and a sink that reads a source."""


def said(layers: tuple[Layer, ...] = LAYERS, length: int = 3) -> BlockStack:
    stack = make(layers)
    source = {"source": tokens(1, 2, 16, seed=9)} if any(layer.reads for layer in layers) else {}
    with torch.no_grad():
        stack(tokens(1, length, 16), **source)
    return stack


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """A small file: an int64 of its header's length, the header, and the tensors."""
    path = tmp_path / "whole.safetensors"
    KVCache.from_model(said()).save(path)
    return path.read_bytes()


class Damaged:
    """Counts of what became of damaged files."""

    def __init__(self, folder: Path, whole: bytes) -> None:
        self.path, self.whole = folder / "damaged.safetensors", whole
        self.expected = cache_snapshots(said())
        self.refused = self.equal = 0

    def load(self, content: bytes) -> None:
        """Refused with the file's name; or loaded with exactly what was saved."""
        assert content != self.whole
        self.path.write_bytes(content)
        try:
            cache = KVCache.load(self.path)
        except FileFormatError as error:
            self.refused += str(error).startswith(f"{self.path}: expected")
            return
        stack = make(LAYERS)
        cache.install(stack)
        assert cache_snapshots(stack) == self.expected, "loaded, but not what was saved"
        self.equal += 1

    def check(self, name: str, least: int) -> None:
        sys.stdout.write(f"{name}: {self.refused} refused, {self.equal} loaded with equal content, 0 otherwise\n")
        assert self.refused + self.equal >= least
        assert self.refused > 0.99 * least


@pytest.mark.slow
def test_flipped_bits(tmp_path: Path, whole: bytes) -> None:
    """One bit of every byte in turn, and two to five bytes at a time, anywhere."""
    damaged, draw = Damaged(tmp_path, whole), random.Random(0)
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << draw.randrange(8)
        damaged.load(bytes(content))
    for _ in range(1000):
        content = bytearray(whole)
        for place in draw.sample(range(len(whole)), draw.randint(2, 5)):
            content[place] ^= draw.randint(1, 255)
        damaged.load(bytes(content))
    damaged.check(f"{len(whole)} bytes flipped", 3000)


def test_truncated_and_oversized(tmp_path: Path, whole: bytes) -> None:
    """An empty file is one that was cut at 0."""
    damaged, draw = Damaged(tmp_path, whole), random.Random(0)
    lengths = {*range(32), *range(len(whole) - 32, len(whole)), *draw.sample(range(len(whole)), 150)}
    for length in lengths:
        damaged.load(whole[:length])
    for more in (b"\0", b" ", b"}", whole[:8], whole, bytes(1000)):
        damaged.load(whole + more)
        damaged.load(more + whole)
    damaged.check("cut and lengthened", 200)


@pytest.mark.parametrize("more", [300 << 30, 1, -1])
def test_a_file_of_another_size_than_its_header_says_is_not_read(tmp_path: Path, whole: bytes, more: int) -> None:
    """A sparse file takes no room on the disk, and would take all memory."""
    path = tmp_path / "whole.safetensors"
    length = len(whole) + more
    os.truncate(path, length)
    expected = rf"^{path}: .*of {len(whole):,} bytes, as its header says, got {length:,}"
    with pytest.raises(FileFormatError, match=expected):
        KVCache.load(path)


def with_header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def changed(whole: bytes) -> bytes:
        size = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + size])
        replaced = change(header)
        text = json.dumps(header if replaced is None else replaced).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + size :]

    return changed


def of_metadata(**texts: object) -> Callable[[bytes], bytes]:
    return with_header(lambda header: header["__metadata__"].update(texts))


def swap(header: dict, key: str) -> None:
    (one, two) = [name for name in header if name.endswith(("self.key", "self.value"))][:2]
    header[one][key], header[two][key] = header[two][key], header[one][key]


def overlap(header: dict) -> None:
    (one, two) = [name for name in header if name.endswith(("self.key", "self.value"))][:2]
    header[one]["data_offsets"] = header[two]["data_offsets"]


def rename(header: dict) -> None:
    (name, *_) = [name for name in header if name.endswith("self.key")]
    header[name + "s"] = header.pop(name)


HEADERS = {
    "overlapping offsets": with_header(overlap),
    "offsets of another tensor": with_header(lambda header: swap(header, "data_offsets")),
    "another shape": with_header(lambda header: swap(header, "shape") or rename(header)),
    "another name": with_header(rename),
    "another dtype": with_header(
        lambda header: (
            [tensor.update(dtype="I64") for name, tensor in header.items() if name != "__metadata__"] and None
        )
    ),
    "another format": of_metadata(format="weights"),
    "an older version": of_metadata(version="0"),
    "a newer version": of_metadata(version="2"),
    "another digest": of_metadata(digest="0" * 64),
    "layers of another conversation": of_metadata(layers="{}"),
    "a number where text belongs": of_metadata(layers=1),
    "no metadata": with_header(lambda header: {name: t for name, t in header.items() if name != "__metadata__"}),
    "null for metadata": with_header(lambda header: header.update(__metadata__=None)),
    "no offsets": with_header(lambda header: [each.pop("data_offsets", None) for each in header.values()] and None),
    "offsets that are no numbers": with_header(
        lambda header: (
            [each.update(data_offsets=[None, "x"]) for name, each in header.items() if name != "__metadata__"] and None
        )
    ),
    "offsets without an end": with_header(
        lambda header: (
            [each.update(data_offsets=[0, math.inf]) for name, each in header.items() if name != "__metadata__"]
            and None
        )
    ),
    "a tensor that is none": with_header(lambda header: header.update({"blocks.0.attention/self.key": None})),
    "a list for a header": with_header(lambda header: [header]),
    "a very deep header": lambda whole: (200_000).to_bytes(8, "little") + b"[" * 200_000 + whole,
    "a header of the longest length": lambda whole: b"\xff" * 8 + whole[8:],
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name: str, tmp_path: Path, whole: bytes) -> None:
    damaged = Damaged(tmp_path, whole)
    damaged.load(HEADERS[name](whole))
    assert (damaged.refused, damaged.equal) == (1, 0)


def test_versions_and_formats_are_named(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "other.safetensors"
    for name, message in (("a newer version", "expected version 1 .*'2'"), ("another format", "'weights'")):
        path.write_bytes(HEADERS[name](whole))
        with pytest.raises(FileFormatError, match=rf"other\.safetensors: {message}|other\.safetensors: .*{message}"):
            KVCache.load(path)


@pytest.mark.parametrize("kind", [KVCache, LayerCache])
def test_what_was_never_a_conversation(kind: type, tmp_path: Path) -> None:
    """Weights in a safetensors file, a text, a folder, and a missing file."""
    save_file({"blocks.0.attention/self.key": torch.zeros(2)}, tmp_path / "weights.safetensors")
    (tmp_path / "text.safetensors").write_text("{}")
    for name in ("weights.safetensors", "text.safetensors"):
        with pytest.raises(FileFormatError, match=rf"{re.escape(name)}: expected"):
            kind.load(tmp_path / name)
    with pytest.raises(FileFormatError, match=rf"{re.escape(tmp_path.name)}: expected a regular file, got a folder"):
        kind.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        kind.load(tmp_path / "nowhere.safetensors")


def test_a_model_is_no_layer(tmp_path: Path, whole: bytes) -> None:
    with pytest.raises(FileFormatError, match=r"whole\.safetensors: expected the kv_cache of one layer, got 3"):
        LayerCache.load(tmp_path / "whole.safetensors")


ATTENTION = r"'blocks\.0\.attention' has "
OTHERS = {
    "heads": (lambda: make((Layer(3, groups=4), *MIXED[1:])), ATTENTION + "num_kv_heads=4 there and 2 here"),
    "head_dim": (lambda: make(MIXED, "none", head_dim=8), ATTENTION + "head_dim=8 there and 4 here"),
    "window": (lambda: make((Layer(4, groups=2), *MIXED[1:])), ATTENTION + "window_size=4 there and 3 here"),
    "no window": (lambda: make((Layer(None, groups=2), *MIXED[1:])), ATTENTION + "window_size=None there and 3 here"),
    "sinks": (lambda: make((Layer(3, 1, groups=2), *MIXED[1:])), ATTENTION + "num_sinks=1 there and 0 here"),
    "positions": (lambda: make(MIXED, "rotary interleaved"), ATTENTION + "position=.* there and .* here"),
    "fewer layers": (lambda: make(MIXED[:2]), r"'blocks\.2\.attention' is not in the model"),
    "more layers": (lambda: make((*MIXED, Layer())), r"'blocks\.3\.attention' is not in the conversation"),
    "a reader": (
        lambda: make((*MIXED[:2], Layer(None, groups=4, reads=True))),
        r"'blocks\.2\.cross_attention' is not in the conversation",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("begun", [False, True])
def test_another_model_is_refused_with_every_difference(name: str, begun: bool, tmp_path: Path) -> None:
    """Of a file, and of a fork that never was in one; the model, and what it may hold, stay as they are."""
    stack, path = said(MIXED), tmp_path / "chat.safetensors"
    cache = KVCache.from_model(stack)
    cache.save(path)
    build, difference = OTHERS[name]
    for conversation in (KVCache.load(path), cache.fork(), KVCache.join([cache, cache])):
        other = build()
        if begun:
            with torch.no_grad():
                other.blocks[1](tokens(1, 2, 16))
        before = cache_snapshots(other)
        with pytest.raises(ArgumentError, match=f"^model: expected .*{difference}"):
            conversation.install(other)
        assert cache_snapshots(other) == before
        assert conversation.length == 3


def test_a_reader_that_kept_no_source_is_still_a_place(tmp_path: Path) -> None:
    """While gradients are recorded no source is kept. The conversation still has a slot for the cross-attention, in a
    file, in forks and joined, and continues in a model of the same structure."""
    stack, path, source = make(READERS), tmp_path / "chat.safetensors", tokens(1, 2, 16, seed=9)
    stack(tokens(1, 3, 16), source)
    cache = KVCache.from_model(stack)
    cache.save(path)
    expected = stack(tokens(1, 1, 16, seed=1), source)
    cache.truncate(3)
    for conversation in (KVCache.load(path), cache.fork(), KVCache.join([cache])):
        other = make(READERS)
        conversation.install(other)
        torch.testing.assert_close(other(tokens(1, 1, 16, seed=1), source), expected, atol=1e-12, rtol=0)
        with pytest.raises(ArgumentError, match="is not in the model"):
            conversation.remove(other).install(make(tuple(Layer(r.window, r.sinks, r.groups) for r in READERS)))
