"""Exchange of what a call publishes: in one piece, without an exception at its edges and without waiting."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.integration.models import all_caches
from tests.models.variants import decoder_only, ids
from tests.oracle import Options
from tests.setups import build, tokens
from transformer.cache import exchange, holders
from transformer.errors import ConcurrentUseError

PATIENCE = 20.0
TOKEN = tokens(1, 1, 16)


def module() -> nn.Module:
    return build(Options(causal=True, cached=True)).eval()


def finish(work: Callable[[], None]) -> None:
    """Runs it in a thread of its own, so that waiting for ever is a failure, and raises what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                work()
        except BaseException as error:  # raised below
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "no call waits for ever"
    if raised:
        raise raised[0]


def at_event(call: Callable[[], object], number: int, action: Callable[[], object]) -> bool:
    """Makes a call, with an action at the n-th line or end of a function that publishes; whether there were so many."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if event == "call":
            return trace if frame.f_code.co_filename.endswith(("lease.py", "call.py")) else None
        count += 1
        if count == number:
            sys.settrace(None)
            action()
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count >= number


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_interrupt_at_any_event_leaves_nothing_taken() -> None:
    def work() -> None:
        clean = module()
        outs = [clean(TOKEN) for _ in range(3)]
        for number in range(1, 10_000):
            interrupted = module()
            interrupted(TOKEN)
            try:
                if not at_event(lambda m=interrupted: m(TOKEN), number, interrupt):
                    break
            except KeyboardInterrupt:
                pass
            length = interrupted.kv_cache.length
            assert length in (1, 2)
            assert torch.equal(interrupted(TOKEN), outs[length])
        assert number > 20

    finish(work)


@pytest.mark.slow
@pytest.mark.parametrize("model", [module, lambda: decoder_only().enable_cache()], ids=["module", "model"])
def test_a_handler_that_uses_another_cache_does_not_wait(model: Callable[[], nn.Module]) -> None:
    """A signal handler or a finaliser may run within any call, and use a model itself."""

    def work() -> None:
        given = TOKEN if model is module else ids(1, 1)
        clean = model()
        outs = [clean(given) for _ in range(2)]
        for number in range(1, 10_000):
            called, other = model(), decoder_only().enable_cache()
            called(given)
            happened = []

            def handler(other: nn.Module = other, happened: list[bool] = happened) -> None:
                other.clear_cache()
                happened.append(True)

            called_again = []
            there = at_event(lambda c=called, o=called_again: o.append(c(given)), number, handler)
            assert torch.equal(called_again[0], outs[1])
            if not there:
                break
            assert happened
        assert number > 20

    finish(work)


def test_all_is_set_or_nothing() -> None:
    first, second = SimpleNamespace(a=1), SimpleNamespace(a=2)
    changes = [(first, "a", 3), (second, "a", 4)]
    with pytest.raises(ConcurrentUseError, match="another call has changed it"):
        exchange([(first, "a", first.a), (second, "a", 0)], changes)
    assert (first.a, second.a) == (1, 2)
    exchange([(first, "a", first.a), (second, "a", second.a)], changes)
    assert (first.a, second.a) == (3, 4)
    exchange((), [(first, "a", 5)])
    assert first.a == 5


def test_what_is_replaced_is_freed_after_all_is_set() -> None:
    """A finaliser sees what the call has made, not something between."""

    class Old:
        def __del__(self) -> None:
            seen.append((first.a, second.a))

    seen: list[tuple[object, object]] = []
    first, second = SimpleNamespace(a=Old()), SimpleNamespace(a=None)
    exchange((), [(first, "a", 1), (second, "a", 2)])
    assert seen == [(1, 2)]


def test_a_refused_exchange_leaves_a_conversation_alone() -> None:
    model = decoder_only().enable_cache()
    with torch.no_grad():
        model(ids(1, 3))
    before = all_caches(model)
    slots = [holder.slot for holder in holders(model).values()]
    changes = [(slot, "cache", None) for slot in slots]
    with pytest.raises(ConcurrentUseError):
        exchange([(slots[-1], "cache", None)], changes)
    assert all_caches(model) == before
