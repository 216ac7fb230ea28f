"""Appending to equal rows in plain integers: the same as the general way, with few calls, and never more allowed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import transformer
from transformer import LayerCache
from transformer.cache import CacheContents, Chunk, Lengths, Step, append, plan_step
from transformer.cache.append import append_uniform, appended
from transformer.cache.state import SelfAttentionState
from transformer.errors import CacheFullError, CacheStateError, DtypeError, ShapeError
from transformer.masks import Rule

ROOT = Path(transformer.__file__).parent


def step_of(contents: CacheContents, key: torch.Tensor, window: int | None) -> Step:
    chunk = Chunk(key.shape[0], key.shape[2], Lengths((key.shape[2],)), key.device, None, None)
    return plan_step(contents, chunk, Rule(True, window), None)


def given_tokens(batch: int, tokens: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    key = torch.arange(first, first + tokens).float().view(1, 1, tokens, 1).expand(batch, 2, tokens, 4).contiguous()
    return key, -key


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=25),
    st.sampled_from([None, 1, 4, 12]),
    st.sampled_from([None, 14, 200]),
    st.integers(1, 3),
    st.booleans(),
)
@torch.no_grad()
def test_it_gives_the_same_as_the_general_way(
    cut: list[int], window: int | None, most: int | None, batch: int, sliding: bool
) -> None:
    """Views and states after each call, on buffers of their own; where one refuses, so does the other."""
    window = window if sliding else None
    quick = LayerCache(2, 4, window_size=window, max_length=most)
    general = LayerCache.of(quick.spec)
    seen = 0
    for tokens in cut:
        if most is not None and (seen if window is None else min(seen, window)) + tokens > most:
            continue
        key, value = given_tokens(batch, tokens, seen)
        step, state = step_of(general.contents, key, window), general.contents.state
        if state is None:
            state = SelfAttentionState.empty(key, 0)
        expected, after = appended(state, key, value, step, general.spec, 0)
        general.contents = CacheContents(after)
        after.buffers.lease.tickets[:] = [after.ticket]
        before = quick.contents
        found = before.state and append_uniform(before.state, key, value, step, quick.spec)
        if found is None:
            view, contents = quick.append(before, key, value, step)
        else:
            view, contents = found[0], CacheContents(found[1])
        for change in quick.appending(contents):
            setattr(*change)
        assert torch.equal(view.key, expected.key)
        assert torch.equal(view.value, expected.value)
        assert view[2:] == expected[2:]
        assert contents.state[1:-1] == after[1:-1]
        assert contents.state.buffers.capacity == after.buffers.capacity
        seen += tokens


def counted(function: Callable[[], object]) -> Counter[str]:
    """Calls of Python functions of the package, by file."""
    calls: Counter[str] = Counter()

    def count(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and ROOT in path.parents:
            calls[path.name] += 1

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def filled(most: int | None = None, window: int | None = None) -> tuple[LayerCache, torch.Tensor, torch.Tensor]:
    """A cache with 5 tokens of 2 rows, fed in expanding mode, and the next token."""
    cache = LayerCache(2, 4, max_length=most, window_size=window)
    key, value = given_tokens(2, 5, 0)
    with torch.no_grad():
        _, contents = cache.append(cache.contents, key, value, step_of(cache.contents, key, None))
    for change in cache.appending(contents):
        setattr(*change)
    return cache, *given_tokens(2, 1, 5)


@pytest.mark.parametrize("most", [None, 9])
def test_a_step_of_decoding_takes_few_calls(most: int | None) -> None:
    cache, key, value = filled(most)
    step = step_of(cache.contents, key, None)
    with torch.inference_mode():
        calls = counted(lambda: cache.append(cache.contents, key, value, step))
    assert sum(calls.values()) <= 4, calls
    assert calls.keys() == {"layer.py", "append.py", "buffers.py"}


@pytest.mark.parametrize(
    ("most", "error", "message", "change"),
    [
        (9, ShapeError, "expected 2 rows", lambda key, step: (key[:1], step)),
        (9, DtypeError, "torch.float64", lambda key, step: (key.double(), step)),
        (9, CacheStateError, "row lengths", lambda key, step: (key, replace(step, past_lengths=Lengths((4,))))),
        (5, CacheFullError, "at most 5 tokens .* got 6", lambda key, step: (key, step)),
    ],
)
def test_what_does_not_continue_is_refused(most: int, error: type[Exception], message: str, change: Callable) -> None:
    # The window gives the buffer more slots than there may be tokens.
    cache, key, value = filled(most, window=4)
    key, step = change(key, step_of(cache.contents, key, None))
    state = cache.contents.state
    with torch.no_grad():
        assert append_uniform(state, key, value, step, cache.spec) is None
        with pytest.raises(error, match=message):
            cache.append(cache.contents, key, value, step)
    assert state.buffers.lease.is_held_by(state.ticket), "a refusal leaves the lease where it was"


def test_gradients_and_forks_and_rows_of_their_own_go_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, key, value = filled()
    step, state = step_of(cache.contents, key, None), cache.contents.state
    with torch.no_grad():
        ragged = replace(step, new_lengths=Lengths((1, 0)))
        assert append_uniform(state, key, value, ragged, cache.spec) is None
    assert append_uniform(state, key, value, step, cache.spec) is None, "a graph is recorded"
    with torch.no_grad():
        fork = cache.fork().contents.state
        assert append_uniform(fork, key, value, step, cache.spec) is None
        assert append_uniform(state, key, value, step, cache.spec) is not None, "the newest state goes on in place"
        assert append_uniform(state, key, value, step, cache.spec) is None, "once"
    events = []
    monkeypatch.setattr(append.logger, "debug", lambda text, event, *more: events.append(event))
    with torch.no_grad():
        cache.append(cache.contents, key, value, step)
    assert events == ["copied, since others may read the buffer before"]
