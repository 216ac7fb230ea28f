"""Log messages of the caches about their memory, at debug level only."""

from __future__ import annotations

import logging

import pytest
import torch

from transformer import GroupQueryAttention, KVCache

ROOM = "transformer.cache"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, logger=ROOM)
    return caplog


def lines(log: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Each message of the caches since the last look, with the logger that it came by."""
    records = [record for record in log.records if record.name.startswith(f"{ROOM}.")]
    found = [(record.name.removeprefix(f"{ROOM}."), record.getMessage()) for record in records]
    log.clear()
    return found


def feed(module: GroupQueryAttention, length: int) -> None:
    module(torch.randn(1, length, 8))


@torch.no_grad()
def test_allocation_growth_and_reset(log: pytest.LogCaptureFixture) -> None:
    module = GroupQueryAttention(8, 4, 2, True, True)
    feed(module, 5)
    assert lines(log) == [
        ("append", "allocated: 0 tokens cached before the call, 69 slots a row (before: 0), 2208 bytes (before: 0)")
    ]
    for _ in range(64):
        feed(module, 1)
    assert lines(log) == [], "a step that finds room has nothing to tell"
    feed(module, 1)
    assert lines(log) == [
        ("append", "grown: 69 tokens cached before the call, 138 slots a row (before: 69), 4416 bytes (before: 2208)")
    ]
    module.kv_cache.reserve(100)
    assert lines(log) == [("layer", "reserved: 170 slots a row (before: 138), 5440 bytes")]
    module.kv_cache.clear()
    assert lines(log) == [("operations", "cleared: 70 tokens seen, 70 cached, 5440 bytes")]


@torch.no_grad()
def test_a_window_is_compacted(log: pytest.LogCaptureFixture) -> None:
    module = GroupQueryAttention(8, 4, 2, True, True, window_size=4, num_sinks=1)
    feed(module, 50)
    feed(module, 9)
    limit = "72 slots a row"
    assert lines(log) == [
        ("append", f"allocated: 0 tokens cached before the call, {limit} (before: 0), 2336 bytes (before: 32)"),
        ("append", f"compacted: 4 tokens cached before the call, {limit} (before: 72), 2336 bytes (before: 2336)"),
    ]
    for _ in range(72 - 4):
        feed(module, 1)
    assert lines(log) == []
    feed(module, 1)
    assert lines(log) == [
        ("append", f"compacted: 4 tokens cached before the call, {limit} (before: 72), 2336 bytes (before: 2336)")
    ]


@torch.no_grad()
def test_a_fork_that_writes_and_a_source(log: pytest.LogCaptureFixture) -> None:
    cache = KVCache(num_layers=1, num_kv_heads=1, head_dim=2)
    pair = torch.ones(2, 1, 1, 3, 2)
    cache.update(0, "self", *pair)
    cache.update(0, "cross", *pair.clone())
    lines(log)
    fork = cache.fork()
    fork.update(0, "self", *pair)
    fork.update(0, "cross", *pair.clone())
    assert lines(log) == [
        (
            "append",
            "copied, since others may read the buffer before: 3 tokens cached before the call, "
            "67 slots a row (before: 67), 1072 bytes (before: 1072)",
        ),
        ("cached_layer", "source kept: 3 tokens, 48 bytes"),
    ]


@torch.no_grad()
def test_nothing_is_formatted_or_written_by_itself(capfd: pytest.CaptureFixture[str]) -> None:
    module = GroupQueryAttention(8, 4, 2, True, True)
    feed(module, 5)
    module.kv_cache.clear()
    assert capfd.readouterr() == ("", "")
    room = logging.getLogger(ROOM)
    names = [name for name in logging.root.manager.loggerDict if name == ROOM or name.startswith(f"{ROOM}.")]
    assert {f"{ROOM}.append", f"{ROOM}.layer", f"{ROOM}.operations"} <= set(names)
    assert not any(logging.getLogger(name).handlers for name in (*names, "transformer"))
    assert not room.isEnabledFor(logging.DEBUG)


@torch.no_grad()
def test_a_step_that_finds_room_does_not_even_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    module = GroupQueryAttention(8, 4, 2, True, True, max_cache_length=20)
    feed(module, 5)
    asked = []

    def ask(logger: logging.Logger, *given: object) -> None:
        if logger.name.startswith(ROOM):
            asked.append(given)

    monkeypatch.setattr(logging.Logger, "debug", ask)
    monkeypatch.setattr(logging.Logger, "isEnabledFor", ask)
    for _ in range(15):
        feed(module, 1)
    assert asked == []
