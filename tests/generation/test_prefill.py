"""Prefill: chunks give what one call gives, caches get their room once, and a caller is told how far it has come."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.variants import VARIANTS, VOCAB, decoder_only, encoder_decoder, ids, kept
from tests.setups import padding
from transformer.cache.policies import KeyNorm, LastQueries
from transformer.errors import ArgumentError
from transformer.generation import GenerationOptions, prefill
from transformer.generation.prefill import chunk_size
from transformer.generation.prompt import Prompt
from transformer.kernels import tuned

OLD = "prefill_chunk is now prefill_chunk_size"
PROMPT = ids(3, 19)
REAL = padding([(0, 19), (7, 12), (0, 3)], 19)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of about four columns by default."""
    monkeypatch.setattr(prefill, "CHUNK_TOKENS", 12)
    monkeypatch.setattr(prefill, "CHUNK_COLUMNS", 4)
    return 4


@pytest.fixture
def moves(caplog: pytest.LogCaptureFixture) -> Any:
    """How often the buffers of all layers were allocated, or moved, since the last time."""
    caplog.set_level(logging.DEBUG, logger="transformer.cache")

    def taken() -> list[str]:
        words = [record.getMessage().partition(":")[0] for record in caplog.records]
        caplog.clear()
        return words

    return taken


def calls(model: torch.nn.Module) -> list[int]:
    """The columns of each call of a model, from now on."""
    columns: list[int] = []
    model.register_forward_pre_hook(lambda _, given: columns.append(given[0].shape[1]))
    return columns


# --- chunks -----------------------------------------------------------------------------------------------------------


def prompt_of(rows: int, columns: int) -> Prompt:
    return Prompt(torch.zeros(rows, columns, dtype=torch.int64), None, [columns] * rows)


def test_default_chunks_are_about_equally_long() -> None:
    for columns, size in ((1, 1), (2048, 2048), (2049, 1025), (3000, 1500), (4097, 1366), (12_000, 2000)):
        assert chunk_size(None, prompt_of(1, columns), False) == size
    for window, size in ((100, 2000), (256, 256), (1024, 1000), (4096, 2000)):
        assert chunk_size(None, prompt_of(1, 12_000), False, window) == size
    assert chunk_size(None, prompt_of(4, 3000), False) == 500
    assert chunk_size(None, prompt_of(64, 1000), False) == 250
    assert chunk_size(None, prompt_of(1, 12_000), True) == 12_000
    assert chunk_size(1000, prompt_of(1, 12_000), True) == chunk_size(1000, prompt_of(1, 12_000), False) == 1000
    assert chunk_size(1000, prompt_of(1, 3), False) == 3


WAYS: list[dict[str, Any]] = [
    {},
    {"num_beams": 2},
    {"temperature": 1.0, "num_return_sequences": 2, "seed": 1},
    {"repetition_penalty": 1.5},
]


@pytest.mark.parametrize("real", [None, REAL], ids=["no padding", "padding"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("small_chunks")
def test_chunks_are_one_shot(variant: str, real: Tensor | None) -> None:
    for options in WAYS:
        given = {"max_new_tokens": 5, **options}
        expected = decoder_only(variant).generate(PROMPT, real, prefill_chunk_size=19, **given)
        model = decoder_only(variant)
        read = calls(model)
        assert torch.equal(model.generate(PROMPT, real, **given), expected)
        assert read[:5] == [4, 4, 4, 4, 3]
        assert torch.equal(model.generate(PROMPT, real, prefill_chunk_size=7, **given), expected)


@pytest.mark.parametrize("options", [{"cache_dtype": "int8"}, {"max_length": 40}, {"max_length": 40, "layers": [0, 1]}])
@pytest.mark.usefixtures("small_chunks")
def test_conversations_in_chunks(options: dict[str, Any]) -> None:
    one, other = (decoder_only("gqa rotary, window, both").enable_cache(**options) for _ in range(2))
    for turn in range(2):
        tokens = ids(3, 9, seed=turn)
        expected = one.generate(tokens, max_new_tokens=4, prefill_chunk_size=9)
        assert torch.equal(other.generate(tokens, max_new_tokens=4), expected)
    assert one.kv_cache.lengths.tolist() == other.kv_cache.lengths.tolist() == [26] * 3


@pytest.mark.parametrize("policy", [KeyNorm(), LastQueries(window=4, kernel_size=3)])
@pytest.mark.usefixtures("small_chunks")
def test_a_budget_chooses_among_the_whole_prompt(policy: Any) -> None:
    """By default: chunks of a given size are compressed one after the other, as calls of the model are."""
    model, expected = (decoder_only().enable_cache(cache_budget=(8, policy)) for _ in range(2))
    read = calls(model)
    out = model.generate(PROMPT, max_new_tokens=3)
    assert read == [19, 1, 1, 1]
    assert torch.equal(out, expected.generate(PROMPT, max_new_tokens=3, prefill_chunk_size=19))
    by_hand, given = (decoder_only().enable_cache(cache_budget=(8, policy)) for _ in range(2))
    with torch.no_grad():
        for part in PROMPT.split(6, 1):
            by_hand(part)
    given.generate(PROMPT, max_new_tokens=1, prefill_chunk_size=6)
    assert given.kv_cache.cached_length == by_hand.kv_cache.cached_length == 8
    for ours, theirs in zip(given.kv_cache.layers.values(), by_hand.kv_cache.layers.values(), strict=True):
        assert ours.nbytes == theirs.nbytes


@pytest.mark.usefixtures("small_chunks")
def test_targets_of_an_encoder_decoder_in_chunks() -> None:
    model, source, target = encoder_decoder(), ids(3, 6), ids(3, 11, seed=4)
    expected = model.generate(source, target_ids=target, max_new_tokens=4, use_cache=False)
    assert torch.equal(model.generate(source, target_ids=target, max_new_tokens=4), expected)


# --- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
def test_room_is_made_once(moves: Any) -> None:
    real = torch.arange(90) >= torch.tensor([[0], [40], [89]])
    for mask in (None, real, real.flip(1)):
        model = decoder_only().enable_cache()
        model.generate(ids(3, 90), mask, max_new_tokens=9)
        assert moves() == ["allocated"] * 2
        assert {cache.nbytes for cache in model.kv_cache.layers.values()} == {2 * 3 * 4 * 99 * 4 * 8}


@pytest.mark.parametrize("real", [None, padding([(0, 200), (150, 50), (0, 3)], 200)], ids=["no padding", "padding"])
def test_windows_move_before_the_calls_of_a_prompt(real: Tensor | None, moves: Any) -> None:
    """One layer at a time, so that no call keeps two buffers of every layer; to the states of calls by hand."""
    tokens, variant = ids(3, 200), "mqa alibi, window and sinks"
    model, by_hand = (decoder_only(variant, window_size=8).enable_cache() for _ in range(2))
    new = model.generate(tokens, real, max_new_tokens=1, prefill_chunk_size=8)[:, 200:]
    words = moves()
    assert words[:2] == ["allocated"] * 2
    assert set(words[2:]) == {"moved"}
    with torch.no_grad():
        for part in torch.arange(200).split(8):
            by_hand(tokens[:, part], None if real is None else real[:, part])
        by_hand(new)
    assert {"grown", "compacted"} & set(moves())
    for ours, theirs in zip(model.kv_cache.layers.values(), by_hand.kv_cache.layers.values(), strict=True):
        assert ours.nbytes == theirs.nbytes
        assert ours.lengths.tolist() == theirs.lengths.tolist()
        torch.testing.assert_close(ours["key"], theirs["key"])
        torch.testing.assert_close(ours["value"], theirs["value"])
        assert ours.contents.state.stored == theirs.contents.state.stored


def test_room_is_bounded() -> None:
    """A maximum that no row may ever reach reserves as much as a prompt, or `MIN_ROOM`."""
    model = decoder_only().enable_cache()
    next(model.stream(PROMPT, max_new_tokens=10**9))
    assert model.kv_cache.nbytes == 2 * 2 * 3 * 4 * (19 + prefill.MIN_ROOM) * 4 * 8


@pytest.mark.usefixtures("small_chunks")
def test_a_conversation_of_many_turns_grows_by_doubling(moves: Any) -> None:
    model = decoder_only().enable_cache()
    for turn in range(60):
        model.generate(ids(1, 5, seed=turn), max_new_tokens=5)
    assert model.kv_cache.length == 600
    assert len(moves()) <= 2 * 8


def test_a_long_turn_after_a_short_one_makes_room_once(moves: Any) -> None:
    model = decoder_only().enable_cache()
    model.generate(ids(1, 4), max_new_tokens=2)
    moves()
    model.generate(ids(1, 900), max_new_tokens=4, prefill_chunk_size=100)
    assert moves() == ["reserved"] * 2


def test_samples_share_their_prompt() -> None:
    """And room for new tokens is in buffers of their own."""
    model, alone = decoder_only().enable_cache(), decoder_only().enable_cache()
    with tuned(min_shared_bytes=1):
        model.generate(ids(1, 600), max_new_tokens=3, temperature=1.0, num_return_sequences=4)
        alone.generate(ids(1, 600), max_new_tokens=3)
    assert model.kv_cache.nbytes < 2.5 * alone.kv_cache.nbytes


# --- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prefill_chunk_size": 8}, [0, 8, 16, 19]),
        ({}, [0, 19]),
        ({"use_cache": False}, [0, 19]),
        ({"prefill_chunk_size": 10, "num_beams": 2}, [0, 10, 19]),
    ],
)
@pytest.mark.parametrize("live", [False, True])
def test_progress(options: dict[str, Any], expected: list[int], live: bool) -> None:
    model, seen = decoder_only(), []
    if live:
        model.enable_cache()
    options = {"max_new_tokens": 3, "prompt_progress_callback": lambda *read: seen.append(read), **options}
    model.generate(PROMPT, REAL, **options)
    assert seen == [(read, 19) for read in expected]
    if "num_beams" not in options:
        seen.clear()
        stream = model.clear_cache().stream(PROMPT, REAL, **options)
        assert seen == []
        next(stream)
        assert seen == [(read, 19) for read in expected]


def test_a_callback_that_raises_leaves_the_conversation() -> None:
    model = decoder_only().enable_cache()
    model.generate(PROMPT, max_new_tokens=2)
    before = kept(model)

    def stop(read: int, _: int) -> None:
        if read > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT, max_new_tokens=2, prefill_chunk_size=4, prompt_progress_callback=stop)
    assert kept(model) == before
    model.generate(PROMPT, max_new_tokens=2)


# --- options ----------------------------------------------------------------------------------------------------------


def test_the_old_name_warns() -> None:
    expected = decoder_only().generate(PROMPT, max_new_tokens=3)
    with pytest.warns(DeprecationWarning, match=OLD):
        assert torch.equal(decoder_only().generate(PROMPT, max_new_tokens=3, prefill_chunk=5), expected)
    with pytest.warns(DeprecationWarning, match=OLD):
        assert GenerationOptions(max_new_tokens=1, prefill_chunk=5).prefill_chunk_size == 5
    with (
        pytest.warns(DeprecationWarning, match=OLD),
        pytest.raises(ArgumentError, match=r"^prefill_chunk_size: expected"),
    ):
        GenerationOptions(max_new_tokens=1, prefill_chunk=0)


@pytest.mark.parametrize("value", [3, "text", True])
def test_a_callback_is_callable(value: object) -> None:
    with pytest.raises(ArgumentError, match=r"^prompt_progress_callback: expected a callable"):
        decoder_only().generate(ids(1, 2, VOCAB), max_new_tokens=1, prompt_progress_callback=value)
