"""Files in which rows share a prompt: they hold it once, and are refused where their numbers contradict the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.cache.test_forged_files import Forged, assert_refused
from tests.conversations import assert_same
from tests.oracle import Options
from tests.setups import build, padding, tokens
from transformer import LayerCache
from transformer.errors import FileFormatError
from transformer.kernels import tuned


@pytest.fixture(autouse=True, scope="module")
def _every_row_shares() -> Iterator[None]:
    with tuned(min_shared_bytes=1):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Four rows of two prompts of 5 and 3 tokens, with two tokens of their own."""
    module = build(Options(num_groups=2))
    with torch.no_grad():
        module(tokens(2, 5, 16), attention_mask=padding([(0, 5), (2, 3)], 5))
        module.kv_cache.select([1, 0, 1, 1])
        module(tokens(4, 2, 16, seed=1))
    path = tmp_path_factory.mktemp("whole") / "chat"
    module.kv_cache.save(path)
    return path.read_bytes()


@pytest.fixture
def forged(whole: bytes, tmp_path: Path) -> Forged:
    return Forged(whole, tmp_path / "forged")


def test_what_is_not_changed_loads(forged: Forged) -> None:
    numbers = forged.layers[""]["numbers"]
    assert numbers["prefix_rows"] == [1, 0, 1, 1] or numbers["prefix_rows"] == [0, 1, 0, 0]
    assert forged.tensors["/self.prefix_key"].shape == (2, 2, 5, 4)
    assert forged.tensors["/self.key"].shape == (4, 2, 2, 4)
    loaded = LayerCache.load(forged.write())
    assert loaded.lengths.tolist() == [5, 7, 5, 5]
    assert_same(loaded["key"][0, :, :3], loaded["key"][2, :, :3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda numbers: numbers.update(prefix_rows=[0, 1, 0]), "prefix_rows"),
        (lambda numbers: numbers.update(prefix_rows=[0, 0, 0, 0]), "each of them"),
        (lambda numbers: numbers.update(prefix_rows=[0, 2, 0, 0]), "each of them"),
        (lambda numbers: numbers.update(prefix_rows=[0, -1, 0, 0]), "prefix_rows"),
        (lambda numbers: numbers.update(prefix_rows=[0, True, 0, 0]), "prefix_rows"),
        (lambda numbers: numbers.update(prefix_rows="0100"), "prefix_rows"),
        (lambda numbers: numbers.pop("prefix_rows"), "prefix_rows"),
        (lambda numbers: numbers.update(window=6), "without a window"),
        (lambda numbers: numbers.update(start=[4, 5, 3, 3]), "without a window"),
        (lambda numbers: numbers.update(stored=[3, 5, 2, 3], start=[3, 5, 2, 3], length=[5, 7, 4, 5]), "one position"),
        (lambda numbers: numbers.update(stored=[3, 4, 3, 3], start=[3, 4, 3, 3], length=[5, 6, 5, 5]), "of 4 tokens"),
    ],
)
def test_numbers_that_contradict_are_refused(forged: Forged, change: Callable, message: str) -> None:
    change(forged.layers[""]["numbers"])
    with pytest.raises(FileFormatError, match=message):
        LayerCache.load(forged.write())


@pytest.mark.parametrize("name", ["/self.prefix_key", "/self.prefix_value"])
@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor[:, :1],
        lambda tensor: tensor[:1],
        lambda tensor: tensor[..., :3],
        lambda tensor: tensor[:, :, :4],
        lambda tensor: tensor.float(),
        lambda tensor: tensor.long(),
        lambda tensor: tensor.flatten(),
    ],
)
def test_tensors_that_do_not_fit_are_refused(forged: Forged, name: str, change: Callable) -> None:
    forged.tensors[name] = change(forged.tensors[name]).contiguous()
    assert_refused(forged.write(), LayerCache)


@pytest.mark.parametrize(
    "names", [["/self.prefix_key"], ["/self.prefix_value"], ["/self.prefix_key", "/self.prefix_value"]]
)
def test_a_missing_tensor_is_refused(forged: Forged, names: list[str]) -> None:
    for name in names:
        del forged.tensors[name]
    assert_refused(forged.write(), LayerCache)


def test_what_lies_after_a_prompt_is_not_read(forged: Forged) -> None:
    """NaN in slots that no row has."""
    rows = forged.layers[""]["numbers"]["prefix_rows"]
    shorter = rows[0]
    for name in ("/self.prefix_key", "/self.prefix_value"):
        forged.tensors[name][shorter, :, 3:] = float("nan")
    loaded = LayerCache.load(forged.write())
    module = build(Options(num_groups=2))
    module.kv_cache = loaded
    with torch.no_grad():
        assert module(tokens(4, 1, 16, seed=2)).isfinite().all()
