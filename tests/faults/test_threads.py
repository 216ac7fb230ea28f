"""Threads: of two in one module the second is refused at once. No sleeps: each waits for the other."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same, cache_snapshot
from tests.oracle import Options
from tests.setups import SCHEMES, build, tokens
from transformer.errors import CacheStateError, ConcurrentUseError

PATIENCE = 60.0


class Gate:
    """Holds the first call that comes through a part of a module, until it is opened."""

    def __init__(self, part: nn.Module) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.handle = part.register_forward_pre_hook(self.wait)

    def wait(self, *_: object) -> None:
        self.handle.remove()
        self.reached.set()
        assert self.opened.wait(PATIENCE)


def without_gradients(call: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():  # grad mode belongs to a thread
        return call()


@pytest.mark.parametrize("part", ["q_proj", "out_proj"])
@pytest.mark.parametrize("options", [{}, {"window_size": 2, "num_sinks": 1}], ids=str)
def test_the_second_call_is_refused(options: dict, part: str) -> None:
    """The first call is held half-way, before or after the append; the other thread gets ConcurrentUseError with the
    cache as it was; then the first comes through as if it had been alone."""
    module, clean = (build(Options(scheme=SCHEMES["rotary halves"], **options)) for _ in range(2))
    prompt, x = tokens(2, 4, 16), tokens(2, 2, 16, seed=1)
    with torch.no_grad():
        module(prompt), clean(prompt)
    gate = Gate(getattr(module, part))
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(without_gradients, lambda: module(x))
        assert gate.reached.wait(PATIENCE)
        before = cache_snapshot(module)
        for _ in range(2):
            second = threads.submit(without_gradients, lambda: module(tokens(2, 1, 16, seed=2)))
            with pytest.raises(ConcurrentUseError, match="one call at a time"):
                second.result(PATIENCE)
        with pytest.raises(ConcurrentUseError), torch.no_grad():
            module(x)
        assert cache_snapshot(module) == before
        gate.opened.set()
        with torch.no_grad():
            assert torch.equal(first.result(PATIENCE), clean(x))
    assert cache_snapshot(module) == cache_snapshot(clean)
    with torch.no_grad():
        assert torch.equal(module(x), clean(x))
    assert cache_snapshot(module) == cache_snapshot(clean)


def test_a_call_that_raised_lets_the_next_one_in() -> None:
    module, clean = build(Options()), build(Options())
    handle = module.out_proj.register_forward_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            module(tokens(1, 2, 16))
    handle.remove()
    x = tokens(1, 2, 16)
    assert torch.equal(module(x), clean(x))


def test_cross_attention_is_guarded_too() -> None:
    module, x, kv = build(Options(causal=False)), tokens(2, 2, 16), tokens(2, 3, 16, seed=1)
    gate = Gate(module.k_proj)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(without_gradients, lambda: module(x, kv))
        assert gate.reached.wait(PATIENCE)
        with pytest.raises(ConcurrentUseError), torch.no_grad():
            module(x, kv)
        gate.opened.set()
        expected = first.result(PATIENCE)
    with torch.no_grad():
        assert torch.equal(module(x, kv), expected)


def test_without_a_cache_threads_share_a_module() -> None:
    """Without a cache there is no lock: four threads at once, each with its own result."""
    module = build(Options(cached=False, window_size=3, scheme=SCHEMES["rotary halves"]))
    inputs = [tokens(1, 6 + seed, 16, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [module(x) for x in inputs]
    together = threading.Barrier(4, timeout=PATIENCE)

    def call(x: Tensor) -> Tensor:
        together.wait()
        return module(x)

    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(lambda x: without_gradients(lambda: call(x)), inputs))
    assert_same(outputs, expected, atol=1e-12)


def test_copies_are_not_held_up() -> None:
    """What the message advises: a copy made while a call is running has a guard of its own, and is free."""
    module = build(Options())
    with torch.no_grad():
        module(tokens(1, 3, 16))
    gate = Gate(module.q_proj)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(without_gradients, lambda: module(tokens(1, 1, 16)))
        assert gate.reached.wait(PATIENCE)
        gate.handle.remove()
        other = build(Options())
        other.kv_cache = copy.deepcopy(module.kv_cache)
        with torch.no_grad():
            out = other(tokens(1, 1, 16))
        gate.opened.set()
        assert torch.equal(out, first.result(PATIENCE))


@pytest.mark.parametrize("options", [{}, {"window_size": 3}], ids=str)
def test_two_modules_with_one_cache(options: dict) -> None:
    """A cache that two modules share is one conversation: of two calls at once either may be refused, but none that
    came through is lost."""
    first, second = build(Options(**options)), build(Options(**options))
    with torch.no_grad():
        first(tokens(1, 3, 16))
    second.kv_cache = first.kv_cache
    gate, came_through = Gate(first.out_proj), 0
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(without_gradients, lambda: first(tokens(1, 1, 16, seed=1)))
        assert gate.reached.wait(PATIENCE)
        for call in (lambda: without_gradients(lambda: second(tokens(1, 1, 16, seed=2))), running.result):
            try:
                call()
                came_through += 1
            except (ConcurrentUseError, CacheStateError):
                pass
            gate.opened.set()
    assert came_through
    assert first.kv_cache.length == 3 + came_through
