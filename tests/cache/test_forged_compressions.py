"""Files of compressed caches whose positions, queries or weights contradict the rest, with a valid digest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cache.test_forged_files import HOSTILE, Forged, assert_refused
from tests.oracle import Options
from tests.setups import build, padding, tokens
from transformer import LayerCache
from transformer.cache.policies import KeyNorm, LastQueries
from transformer.errors import CacheStateError, FileFormatError


class Both(LastQueries):
    """A policy that needs all that there is."""

    @property
    def needs_weights(self) -> bool:
        return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Three rows of which the last is whole, over a window with sinks, with queries and weights."""
    module = build(Options(num_groups=2, window_size=6, num_sinks=2), cache_budget=(4, Both(1)))
    mask = padding([(0, 9), (2, 7), (6, 3)], 9)
    with torch.no_grad():
        module(tokens(3, 9, 16), None, True, attention_mask=mask)
    path = tmp_path_factory.mktemp("whole") / "chat"
    module.kv_cache.save(path)
    return path.read_bytes()


@pytest.fixture
def forged(whole: bytes, tmp_path: Path) -> Forged:
    return Forged(whole, tmp_path / "forged")


def test_what_is_not_changed_loads(forged: Forged) -> None:
    assert forged.layers[""]["numbers"] == {
        "stored": [7, 5, 0],
        "start": [7, 5, 0],
        "length": [9, 7, 3],
        "window": None,
        "kept_first": [7, 5, 0],
        "kept_end": [9, 7, 0],
    }
    cache = LayerCache.load(forged.write())
    assert cache.cached_lengths.tolist() == [4, 4, 3]
    assert cache.select([2, 1]).compress(3, KeyNorm()).cached_length == 3


@pytest.mark.parametrize("name", ["kept_first", "kept_end"])
def test_numbers_with_every_hostile_value(whole: bytes, tmp_path: Path, name: str) -> None:
    """Refused; what is accepted can be read, and goes on."""
    refused = 0
    for value in [*HOSTILE, [7, 5, 1], [6, 5, 0], [9, 7, 0], [7, 5, -1], [8, 8, 8], [9, 7, 3], [1, 1, 0], [2, 2, 0]]:
        forged = Forged(whole, tmp_path / "forged")
        if forged.layers[""]["numbers"][name] == value:
            continue
        forged.layers[""]["numbers"][name] = value
        with pytest.raises(FileFormatError, match="expected"):
            LayerCache.load(forged.write())
        refused += 1
    assert refused > 28


KEPT, QUERIES, WEIGHTS = "/self.kept", "/self.queries", "/self.weights"
CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "no positions": lambda t: t.pop(KEPT),
    "positions of a head less": lambda t: t.update({KEPT: t[KEPT][:, :1].contiguous()}),
    "a column more": lambda t: t.update({KEPT: torch.cat((t[KEPT], t[KEPT][:, :, :1]), 2)}),
    "positions of floats": lambda t: t.update({KEPT: t[KEPT].double()}),
    "positions that descend": lambda t: t.update({KEPT: t[KEPT].flip(2)}),
    "a position twice": lambda t: t[KEPT][0, 0].copy_(t[KEPT][0, 0, 1:].expand(2)),
    "a position of a sink": lambda t: t[KEPT][0, 0, :1].fill_(1),
    "a position that is still to come": lambda t: t[KEPT][0, 0, 1:].fill_(9),
    "a position in a row that is whole": lambda t: t[KEPT][2, 0, :1].fill_(2),
    "no position where there is one": lambda t: t[KEPT][1, 1].fill_(-1),
    "queries of another width": lambda t: t.update({QUERIES: t[QUERIES][..., :3].contiguous()}),
    "queries of a row less": lambda t: t.update({QUERIES: t[QUERIES][:2]}),
    "queries of heads in no groups": lambda t: t.update({QUERIES: t[QUERIES][:, :3].contiguous()}),
    "queries of whole numbers": lambda t: t.update({QUERIES: t[QUERIES].long()}),
    "no queries in the tensor": lambda t: t.update({QUERIES: t[QUERIES][:, :, :0].contiguous()}),
    "weights of a token less": lambda t: t.update({WEIGHTS: t[WEIGHTS][..., :3].contiguous()}),
    "weights of 16 bits": lambda t: t.update({WEIGHTS: t[WEIGHTS].half()}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_that_contradict_the_numbers(forged: Forged, name: str) -> None:
    CHANGES[name](forged.tensors)
    assert_refused(forged.write(), LayerCache)


def test_a_part_of_what_was_kept_is_no_reason_to_reach_back_further(tmp_path: Path) -> None:
    """A file may have evicted some of it: before the compression there is still nothing."""
    module = build(Options(num_groups=2, window_size=2))
    with torch.no_grad():
        module(tokens(1, 9, 16), None, True)
    module.kv_cache.compress(6, KeyNorm()).save(tmp_path / "chat")
    forged = Forged((tmp_path / "chat").read_bytes(), tmp_path / "forged")
    forged.layers[""]["numbers"].update({"stored": [4], "start": [4]})
    for name in ("/self.key", "/self.value"):
        forged.tensors[name] = forged.tensors[name][:, :, 1:].contiguous()
    cache = LayerCache.load(forged.write())
    with pytest.raises(CacheStateError, match="at least 9"):
        cache.truncate(8)


def test_positions_without_numbers(forged: Forged) -> None:
    for name in ("kept_first", "kept_end"):
        del forged.layers[""]["numbers"][name]
    assert_refused(forged.write(), LayerCache)
