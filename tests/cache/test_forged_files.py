"""Files whose header contradicts their tensors, with a valid digest: refused by name, or correct in use."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as parse
from safetensors.torch import save as build
from torch import Tensor

from tests.blocks.stacks import READERS, cache_snapshots, make
from tests.internals import digest
from tests.setups import tokens
from transformer import KVCache, LayerCache, MultiHeadAttention
from transformer.blocks import BlockStack
from transformer.errors import ArgumentError, CacheStateError, FileFormatError, ForeignFileError

REAL = torch.tensor([[True] * 7, [False] * 3 + [True] * 4])
HOSTILE = [None, True, False, 0, -1, 1, 2, 10**6, 2**31, 2**63, 2**200, 1.5, "x", "", [], [[]], {}, [0], [-1], [2**60]]
HOSTILE += [[7, 4, 4], [7.0, 4.0], [None, None], [4, 7], [5], [True, True], {"a": 1}]


def conversation() -> BlockStack:
    """Two rows of different lengths; layers that see everything, that slide, with and without sinks, and a source."""
    stack = make(READERS)
    with torch.no_grad():
        stack(tokens(2, 7, 16), source=tokens(2, 3, 16, seed=9), attention_mask=REAL, source_mask=REAL[:, 2:5])
    return stack


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "chat"
    KVCache.from_model(conversation()).save(path)
    return path.read_bytes()


class Forged:
    """What a file holds, to be changed and written again with the digest that it should have."""

    def __init__(self, content: bytes, path: Path) -> None:
        self.path, self.tensors = path, parse(content)
        self.metadata: dict[str, str] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])[
            "__metadata__"
        ]
        del self.metadata["digest"]
        self.layers: Any = json.loads(self.metadata["layers"])

    def write(self) -> Path:
        metadata = self.metadata | {"layers": json.dumps(self.layers)}
        self.path.write_bytes(build(self.tensors, metadata | {"digest": digest(metadata, self.tensors)}))
        return self.path


@pytest.fixture
def forged(whole: bytes, tmp_path: Path) -> Forged:
    return Forged(whole, tmp_path / "forged")


def assert_refused(path: Path, kind: type = KVCache) -> None:
    with pytest.raises(FileFormatError) as raised:
        kind.load(path)
    assert str(raised.value).startswith(f"{path}: expected"), raised.value


def test_what_is_not_changed_loads(forged: Forged) -> None:
    stack = make(READERS)
    KVCache.load(forged.write()).install(stack, check_weights=True)
    assert cache_snapshots(stack) == cache_snapshots(conversation())


def places(layers: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (layer, part, key)
        for layer, described in layers.items()
        for part, names in described.items()
        for key in names
        if layer in list(layers)[:3]
    ]


@pytest.mark.slow
def test_every_option_and_number_with_every_hostile_value(whole: bytes, tmp_path: Path) -> None:
    """Refused; or what is held is as it was, every operation works, and it is saved and loaded as it is."""
    refused, accepted = 0, set()
    for layer, part, key in places(Forged(whole, tmp_path).layers):
        for value in HOSTILE:
            forged = Forged(whole, tmp_path / "forged")
            before = forged.layers[layer][part][key]
            if type(value) is type(before) and value == before:
                continue
            forged.layers[layer][part][key] = value
            path = forged.write()
            refusal = ""
            try:
                cache = KVCache.load(path)
            except FileFormatError as error:
                refusal = str(error)
            if refusal:
                assert refusal.startswith(f"{path}: expected")
                refused += 1
                continue
            accepted.add(key)
            assert cache.lengths.tolist() == ([7, 4] if key != "length" else [7, 7])
            assert cache.fork().select([1, 0]).truncate(cache.length).lengths.tolist()[1] == 7
            cache.save(tmp_path / "again")
            again = KVCache.load(tmp_path / "again")
            assert [each.spec for each in again.parts()] == [each.spec for each in cache.parts()]
    assert refused > 650
    # Position schemes are compared by `install`, and lengths of layers by the next step; larger windows and buffers,
    # and a window that was fixed, are possible.
    assert accepted <= {"position", "window", "window_size", "max_length", "start", "length"}


OPEN, SLIDING = "blocks.1.attention", "blocks.2.attention"
"""Layers that see everything, and that slide over 2 tokens with a sink, after 7 and 4 tokens."""

CONTRADICTIONS = {
    "evicted without a window": (OPEN, {}, {"start": [1]}),
    "evicted and not stored without a window": (OPEN, {}, {"start": [1], "stored": [1], "length": [8, 5]}),
    "evicted within the window": (SLIDING, {}, {"start": [6, 3]}),
    "evicted before it was read": (SLIDING, {}, {"start": [8, 5]}),
    "in the cache and not stored": (SLIDING, {}, {"stored": [6, 3]}),
    "more tokens than slots": (OPEN, {}, {"length": [8, 4]}),
    "fewer tokens than slots": (OPEN, {}, {"length": [6, 4]}),
    "more rows than there are": (OPEN, {}, {"length": [7, 4, 4]}),
    "another window than the module's": (SLIDING, {}, {"window": 3}),
    "more cached than allowed": (OPEN, {"max_length": 6}, {}),
    "less allowed than window and sinks": (SLIDING, {"max_length": 2}, {}),
    "sinks without a window": (OPEN, {"num_sinks": 1}, {}),
    "sinks that there are not": (OPEN, {"num_sinks": 1, "window_size": 7}, {}),
    "no sinks where there are some": (SLIDING, {"num_sinks": 0}, {}),
    "other heads": (OPEN, {"num_kv_heads": 2}, {}),
    "another width": (OPEN, {"head_dim": 2}, {}),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_numbers_that_contradict_each_other_or_the_tensors(forged: Forged, name: str) -> None:
    layer, options, numbers = CONTRADICTIONS[name]
    forged.layers[layer]["options"].update(options)
    forged.layers[layer]["numbers"].update(numbers)
    assert_refused(forged.write())


TENSORS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "of whole numbers": lambda tensor: tensor.long(),
    "of bool": lambda tensor: tensor > 0,
    "in another dtype": lambda tensor: tensor.half(),
    "in 8 bits": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "shorter": lambda tensor: tensor[:, :, :-1].contiguous(),
    "longer": lambda tensor: torch.cat((tensor, tensor), 2),
    "of fewer heads": lambda tensor: tensor[:, :1].contiguous(),
    "of other widths": lambda tensor: tensor[..., :-1].contiguous(),
    "of fewer rows": lambda tensor: tensor[:1].contiguous(),
    "of no rows": lambda tensor: tensor[:0].contiguous(),
    "of another rank": lambda tensor: tensor[0].contiguous(),
    "of rank 0": lambda tensor: tensor.sum(),
    "missing": lambda tensor: None,
}
SELF = ["self.key", "self.value", "self.sink_key", "self.sink_value"]
CROSS = ["cross.key", "cross.value", "cross.kv", "cross.mask"]


SOURCE = ("of whole numbers", "of bool", "in 8 bits", "shorter", "of fewer rows", "of no rows", "of another rank")
"""What may not become of a source [B, S, E] and its mask, which has no widths to be wrong."""


@pytest.mark.parametrize(
    ("kind", "change"),
    [(kind, change) for kind in SELF + CROSS[:2] for change in TENSORS] + [(CROSS[2], change) for change in SOURCE],
)
def test_every_tensor_changed(forged: Forged, kind: str, change: str) -> None:
    name = next(name for name in forged.tensors if name.endswith(kind) and "blocks.2" in name)
    tensor = forged.tensors.pop(name)
    # Tokens are the third dimension of keys and values, and the second of a source.
    source = kind in CROSS[2:]
    changed = TENSORS[change](tensor.unsqueeze(1) if source else tensor)
    if changed is not None:
        forged.tensors[name] = (changed.squeeze(1) if source and change != "of another rank" else changed).contiguous()
    assert_refused(forged.write())


@pytest.mark.parametrize(
    "change", [torch.Tensor.long, torch.Tensor.float, lambda mask: mask[:, 1:], lambda mask: mask[:1], torch.Tensor.sum]
)
def test_another_mask_of_a_source(forged: Forged, change: Callable[[Tensor], Tensor]) -> None:
    name = next(name for name in forged.tensors if name.endswith(CROSS[3]))
    forged.tensors[name] = change(forged.tensors[name]).contiguous()
    assert_refused(forged.write())


@pytest.mark.parametrize("layers", [[], None, {}, {"a": 1}, {"a": None}, "x", 1, True])
def test_other_layers(forged: Forged, layers: object) -> None:
    forged.layers = layers
    assert_refused(forged.write())
    assert_refused(forged.path, LayerCache)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "NaN", "", "9" * 5000])
@pytest.mark.parametrize("key", ["layers", "weights"])
def test_metadata_that_is_no_json(forged: Forged, key: str, text: str) -> None:
    forged.metadata[key] = text
    metadata = {**forged.metadata}
    forged.path.write_bytes(build(forged.tensors, metadata | {"digest": digest(metadata, forged.tensors)}))
    assert_refused(forged.path)


@pytest.mark.parametrize("weights", ["[]", "1", '{"a": 1}', '"x"'])
def test_other_weights(forged: Forged, weights: str) -> None:
    forged.metadata["weights"] = weights
    assert_refused(forged.write())


def test_more_than_there_is_to_say(forged: Forged) -> None:
    forged.metadata["more"] = "text"
    assert_refused(forged.write())


def test_more_tensors(forged: Forged) -> None:
    forged.tensors["elsewhere/self.key"] = torch.ones(1)
    assert_refused(forged.write())


@pytest.mark.parametrize("part", ["options", "numbers"])
def test_a_key_more_and_a_key_less(forged: Forged, part: str) -> None:
    for change in (lambda keys: keys.update(more=1), lambda keys: keys.popitem(), dict.clear):
        again = Forged(forged.path.read_bytes() if forged.path.exists() else forged.write().read_bytes(), forged.path)
        change(next(iter(again.layers.values()))[part])
        content = forged.path.read_bytes()
        assert_refused(again.write())
        forged.path.write_bytes(content)


@torch.no_grad()
def test_numbers_in_slots_without_a_token_play_no_part(forged: Forged) -> None:
    """The second row has fewer tokens; where it alone gains one, the rest of its slots is read, with weight 0."""
    forged.tensors[f"{OPEN}/self.value"][1, :, 4:] = float("nan")
    stack, expected = make(READERS), conversation()
    KVCache.load(forged.write()).install(stack)
    step = {"source": tokens(2, 3, 16, seed=9), "source_mask": REAL[:, 2:5]}
    mask = torch.tensor([[False], [True]])
    outputs = [each(tokens(2, 1, 16, seed=1), attention_mask=mask, **step) for each in (stack, expected)]
    torch.testing.assert_close(*outputs, atol=1e-12, rtol=0)


@torch.no_grad()
def test_numbers_in_sinks_that_have_not_come_play_no_part(tmp_path: Path) -> None:
    """A row of one token and one of seven, with three sinks."""
    modules = [MultiHeadAttention(16, 2, True, True, window_size=2, num_sinks=3).double() for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    real = torch.tensor([[True] * 7, [False] * 6 + [True]])
    for module in modules:
        module(tokens(2, 7, 16), attention_mask=real)
    modules[0].kv_cache.save(tmp_path / "whole")
    forged = Forged((tmp_path / "whole").read_bytes(), tmp_path / "forged")
    forged.tensors["/self.sink_value"][1, :, 1:] = float("nan")
    modules[0].kv_cache = LayerCache.load(forged.write())
    outputs = [module(tokens(2, 1, 16, seed=1)) for module in modules]
    torch.testing.assert_close(*outputs, atol=1e-12, rtol=0)


def test_an_older_or_newer_file_names_its_version(forged: Forged) -> None:
    forged.metadata["version"] = "2"
    with pytest.raises(FileFormatError, match="expected version 1 of the format, got '2'"):
        KVCache.load(forged.write())


# --- places ---------------------------------------------------------------------------------------------------------


FOREIGN = {
    "text": b"{}",
    "weights": build({"self.key": torch.zeros(2)}),
    "another format": build({}, {"format": "pt"}),
    "a header too long": (1 << 40).to_bytes(8, "little") + b"{}",
    "a few bytes": b"abc",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_not_ours_is_never_replaced(name: str, tmp_path: Path) -> None:
    path, cache = tmp_path / "file", KVCache.from_model(conversation())
    path.write_bytes(FOREIGN[name])
    for saved in (cache, next(iter(cache.layers.values()))):
        with pytest.raises(ForeignFileError, match=rf"^{path}: expected the name of a new file.*choose another name"):
            saved.save(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(FileExistsError):
        cache.save(tmp_path / "link")
    assert path.read_bytes() == FOREIGN[name]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_of_ours_and_an_empty_one_are_replaced(whole: bytes, tmp_path: Path) -> None:
    path, cache = tmp_path / "file", KVCache.from_model(conversation())
    path.touch()
    cache.save(path)
    assert KVCache.load(path).length == 7
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    header["__metadata__"]["version"] = "0"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    cache.save(path)
    assert KVCache.load(path).length == 7


@pytest.mark.skipif(os.name != "posix", reason="links and the length of names on posix")
@pytest.mark.parametrize(("name", "said"), [("a" * 256, "choose a shorter name"), ("loop", "remove the link")])
def test_a_place_where_no_file_can_be(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=rf"could not be written: .*; {said}.*{name}") as raised:
        KVCache.from_model(conversation()).save(tmp_path / name)
    assert not isinstance(raised.value, ForeignFileError)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("path", [None, 1, b"file"])
def test_what_is_no_path(path: Any) -> None:
    for call in (KVCache.from_model(conversation()).save, KVCache.load, LayerCache.load):
        with pytest.raises(ArgumentError, match=r"^path: expected the name of a file"):
            call(path)


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(ForeignFileError, match=f"^{tmp_path}: expected"):
        KVCache.from_model(conversation()).save(tmp_path)


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    modules = torch.nn.ModuleList([MultiHeadAttention(16, 2, True, True) for _ in range(2)])
    with torch.no_grad():
        for rows, module in enumerate(modules, 1):
            module(tokens(rows, 3, 16).float())
    with pytest.raises(CacheStateError, match=r"cannot be saved .* rows in each layer, got \[1, 2\]"):
        KVCache.from_model(modules).save(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_one_name_twice_among_many_is_found_at_once(tmp_path: Path) -> None:
    """Not by comparing each with all others: that would take hours."""
    names = [*map(str, range(200_000)), "199999"]
    header = ("{" + ",".join(f'"{name}":0' for name in names) + "}").encode()
    path = tmp_path / "file"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FileFormatError, match="the same name twice: '199999'"):
        KVCache.load(path)
