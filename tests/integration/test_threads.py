"""Threads on one model: each call is as if it ran alone, or, over one live conversation, is refused."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same
from tests.integration.models import all_caches, assert_without_caches
from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from tests.oracle import Options
from tests.setups import build, padding, tokens
from transformer.errors import CacheStateError, ConcurrentUseError

REFUSED = (ConcurrentUseError, CacheStateError)
PATIENCE, SECONDS, ROUNDS = 60.0, 0.5, 30

PROMPT, SOURCE = ids(2, 4), ids(2, 5, VOCAB + 2)
REAL = padding([(0, 4), (1, 3)], 4)

Work = Callable[[nn.Module], Tensor]

READING: dict[str, Work] = {
    "forward": lambda model: model(ids(2, 6, seed=3)),
    "forward, padded": lambda model: model(PROMPT, REAL)[REAL],
    "generate": lambda model: model.generate(PROMPT, max_new_tokens=6),
    "generate, padded": lambda model: model.generate(PROMPT, REAL, max_new_tokens=5),
    "generate without caches": lambda model: model.generate(PROMPT, max_new_tokens=3, use_cache=False),
    "beams": lambda model: model.generate(PROMPT, max_new_tokens=3, num_beams=3),
    "stream that is left": lambda model: torch.stack(list(islice(model.stream(PROMPT, max_new_tokens=9), 3))),
}

WRITING: dict[str, Work] = {
    "forward": lambda model: model(SOURCE, PROMPT),
    "generate": lambda model: model.generate(SOURCE, max_new_tokens=5),
    "generate, masked": lambda model: model.generate(SOURCE, padding([(0, 5), (0, 2)], 5), max_new_tokens=4),
    "beams": lambda model: model.generate(SOURCE, max_new_tokens=3, num_beams=2),
    "stream that is left": lambda model: torch.stack(list(islice(model.stream(SOURCE, max_new_tokens=9), 3))),
}


def pairs(works: dict[str, Work]) -> list[tuple[str, str]]:
    """A forward, and a generation, together with each of them."""
    return [*product(["forward"], works), *product(["generate"], list(works)[1:])]


@pytest.fixture(autouse=True)
def _short_turns() -> Iterator[None]:
    """Threads change places every ten microseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*calls: Callable[[], Any], rounds: int = ROUNDS) -> list[list[Any]]:
    """What each call gave, or the exception that it raised, over and over in a thread of its own, for about half
    a second at most."""
    start = threading.Barrier(len(calls), timeout=PATIENCE)
    came: list[list[Any]] = [[] for _ in calls]

    def work(call: Callable[[], Any], own: list[Any]) -> None:
        with torch.no_grad():  # grad mode belongs to a thread
            start.wait()
            until = time.monotonic() + SECONDS
            for _ in range(rounds):
                try:
                    own.append(call())
                except Exception as error:  # looked at by the test
                    own.append(error)
                if time.monotonic() > until:
                    return

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in zip(calls, came, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "no call waits for ever"
    return came


def check_alone(model: nn.Module, works: list[Work]) -> None:
    """Each of these at once on a model without caches of its own gives what it gives alone, and leaves nothing."""
    with torch.no_grad():
        alone = [work(model) for work in works]
    for expected, came in zip(alone, together(*(lambda w=work: w(model) for work in works)), strict=True):
        for result in came:
            if isinstance(result, Exception):
                raise result
            assert_same(result, expected)
    assert_without_caches(model)
    with torch.no_grad():
        assert_same([work(model) for work in works], alone)


@pytest.mark.slow
@pytest.mark.parametrize("names", pairs(READING), ids=" beside ".join)
def test_two_at_once_on_a_model_without_caches(names: tuple[str, ...]) -> None:
    check_alone(decoder_only("gqa relative, pattern"), [READING[name] for name in names])


@pytest.mark.slow
@pytest.mark.parametrize("names", pairs(WRITING), ids=" beside ".join)
def test_two_at_once_on_an_encoder_decoder(names: tuple[str, ...]) -> None:
    check_alone(encoder_decoder(), [WRITING[name] for name in names])


@pytest.mark.parametrize("variant", ["mha rotary", "mqa alibi, window and sinks"])
def test_all_at_once(variant: str) -> None:
    check_alone(decoder_only(variant), list(READING.values()))


# --- one live conversation --------------------------------------------------------------------------------------------


def check_live(model: nn.Module, clean: nn.Module, call: Work, threads: int = 3, rounds: int = ROUNDS) -> int:
    """The same call in several threads: as many as come through give, in some order, what so many give one after the
    other, and the conversation is what it is after these. Gives how many came through."""
    results = [result for own in together(*[lambda: call(model)] * threads, rounds=rounds) for result in own]
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, REFUSED):
            raise result
    came = [result for result in results if isinstance(result, Tensor)]
    with torch.no_grad():
        expected = [call(clean) for _ in came]
        for result in came:
            places = [place for place, other in enumerate(expected) if torch.allclose(result, other, rtol=0, atol=1e-9)]
            assert places, "a call gave what none of them gives alone"
            del expected[places[0]]
        # A failed call leaves nothing that refuses a later one.
        assert_same(call(model), call(clean))
    return len(came)


@pytest.mark.parametrize("options", [{}, {"window_size": 3, "num_sinks": 1}], ids=str)
def test_one_conversation_of_a_module(options: dict[str, int]) -> None:
    module, clean = build(Options(**options)), build(Options(**options))
    with torch.no_grad():
        module(tokens(1, 3, 16)), clean(tokens(1, 3, 16))
    came = check_live(module, clean, lambda m: m(tokens(1, 1, 16, seed=1)))
    assert came
    assert module.kv_cache.length == clean.kv_cache.length == 3 + came + 1


LIVE: dict[str, tuple[Work, int]] = {
    "step": (lambda model: model(PROMPT[:, :1]), 1),
    "chunk": (lambda model: model(PROMPT), 4),
    "generate": (lambda model: model.generate(PROMPT[:, :2], max_new_tokens=3), 5),
    "beams": (lambda model: model.generate(PROMPT[:, :2], max_new_tokens=2, num_beams=2), 4),
    "stream": (lambda model: next(model.stream(PROMPT[:, :2], max_new_tokens=9)), 3),
}


@pytest.mark.parametrize("name", LIVE)
@pytest.mark.parametrize("variant", ["mha rotary", "gqa rotary, window, both"])
def test_one_conversation_of_a_model(name: str, variant: str) -> None:
    """Right or refused, and the length is what came through."""
    call, new_lengths = LIVE[name]
    model, clean = (decoder_only(variant).enable_cache() for _ in range(2))
    with torch.no_grad():
        model(PROMPT), clean(PROMPT)
    came = check_live(model, clean, call, threads=2, rounds=6)
    assert came
    assert model.kv_cache.length == 4 + new_lengths * (came + 1)
    assert len({tuple(cache.lengths.tolist()) for cache in model.kv_cache.layers.values()}) == 1


def test_different_calls_over_one_conversation() -> None:
    """A step during a generation: a call that succeeds is complete."""
    model = decoder_only().enable_cache()
    with torch.no_grad():
        model(PROMPT)
    both = together(*(lambda c=LIVE[name][0]: c(model) for name in ("step", "generate")), rounds=20)
    expected = 4
    for name, results in zip(("step", "generate"), both, strict=True):
        for result in results:
            assert isinstance(result, (Tensor, *REFUSED)), result
            expected += LIVE[name][1] * isinstance(result, Tensor)
    assert expected > 4
    assert model.kv_cache.length == expected
    assert len({tuple(cache.lengths.tolist()) for cache in model.kv_cache.layers.values()}) == 1


def test_one_conversation_of_an_encoder_decoder() -> None:
    """Each generation begins a new target: right, or refused with what the other one made left alone."""
    model, clean = (encoder_decoder().enable_cache() for _ in range(2))
    call: Work = lambda model: model.generate(SOURCE, max_new_tokens=4)  # noqa: E731
    assert check_live(model, clean, call, threads=2)
    assert model.kv_cache.length == clean.kv_cache.length == 5


def test_two_conversations_of_one_model_take_turns() -> None:
    """A generation with its own caches does not change the model's own conversation, also if it is refused."""
    model, other = decoder_only().enable_cache(), decoder_only()
    with torch.no_grad():
        model(PROMPT)
    before = all_caches(model)
    assert_same(model.generate(PROMPT, max_new_tokens=3, use_cache=False), other.generate(PROMPT, max_new_tokens=3))
    plain = lambda: model.generate(PROMPT, max_new_tokens=3, use_cache=False)  # noqa: E731
    for results in together(plain, plain):
        for result in results:
            assert_same(result, other.generate(PROMPT, max_new_tokens=3))
    assert all_caches(model) == before
