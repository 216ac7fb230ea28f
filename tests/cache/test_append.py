"""Appending to equal rows in plain integers: the same as the general way, with few calls, and never more allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.counting import calls_by_file
from transformer import LayerCache
from transformer.cache import CacheContents, CachedLayer, CacheSlot, Lengths, Step, append, exchange
from transformer.cache.append import appended
from transformer.cache.append_uniform import append_uniform
from transformer.cache.state import SelfAttentionState, check_room
from transformer.errors import CacheFullError, CacheStateError, DeviceError, DtypeError, ShapeError
from transformer.masks import Rule


def step_of(contents: CacheContents, key: torch.Tensor, window: int | None, sinks: int = 0) -> Step:
    return Step.of(key[:, 0], None).following(contents.row_lengths, Rule(True, window, sinks))


def given_tokens(batch: int, tokens: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    key = torch.arange(first, first + tokens).float().view(1, 1, tokens, 1).expand(batch, 2, tokens, 4).contiguous()
    return key, -key


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=25),
    st.sampled_from([(None, 0), (1, 0), (4, 0), (12, 0), (4, 2), (3, 5)]),
    st.sampled_from([None, 14, 200]),
    st.integers(1, 3),
    st.lists(st.booleans(), min_size=25, max_size=25),
)
@example([5] + [1] * 24, (4, 0), None, 2, [True] * 25)
@example([4] + [1] * 24, (4, 2), None, 2, [True] * 25)
@example([1] * 25, (3, 5), 200, 1, [True] * 25)
@example([1] * 25, (4, 2), 14, 1, [True] * 10 + [False] * 15)
@example([9] * 25, (12, 0), None, 1, [True] * 25)
@example([9] * 25, (None, 0), None, 1, [False] * 25)
@example([9] * 10 + [1] * 15, (4, 0), None, 1, [False] * 10 + [True] * 15)
@torch.no_grad()
def test_it_gives_the_same_as_the_general_way(
    cut: list[int], window_and_sinks: tuple[int | None, int], most: int | None, batch: int, sliding: list[bool]
) -> None:
    """Views and states after each call, sliding or expanding, on buffers of their own; both refuse the same calls."""
    size, sinks = window_and_sinks
    quick = LayerCache(2, 4, window_size=size, num_sinks=sinks, max_length=most)
    general = LayerCache.of(quick.spec)
    seen = 0
    for tokens, slides in zip(cut, sliding, strict=False):
        window = size if slides else None
        key, value = given_tokens(batch, tokens, seen)
        step, state = step_of(general.contents, key, window, sinks), general.contents.state
        if state is None:
            state = SelfAttentionState.empty(key, sinks)
        before = quick.contents
        try:
            if most is not None:
                check_room(state, step, most)
        except CacheFullError:
            assert before.state is None or append_uniform(before.state, key, value, step, quick.spec) is None
            with pytest.raises(CacheFullError):
                CachedLayer.of(CacheSlot(quick), quick).append(key, value, step)
            continue
        expected, after = appended(state, key, value, step, general.spec, 0)
        general.contents = CacheContents(after)
        exchange((), after.buffers.lease.renew(after.version))
        found = before.state and append_uniform(before.state, key, value, step, quick.spec)
        if found is None:
            view, contents = CachedLayer.of(CacheSlot(quick), quick).append(key, value, step)
        else:
            view, contents = found[0], CacheContents(found[1])
        cached = CachedLayer.of(CacheSlot(quick), quick)
        cached.contents = contents
        cached.publish()
        assert [tensor is None for tensor in (view.sink_key, view.sink_value)] == [expected.sink_key is None] * 2
        for name in ("key", "value", *(("sink_key", "sink_value") if view.sink_key is not None else ())):
            assert torch.equal(getattr(view, name), getattr(expected, name))
        assert (view.first, view.start, view.end) == (expected.first, expected.start, expected.end)
        found, general_way = (each._replace(buffers=None, version=None) for each in (contents.state, after))
        assert found == general_way
        assert contents.state.buffers.capacity == after.buffers.capacity
        seen += tokens


def filled(
    most: int | None = None, window: int | None = None, sinks: int = 0
) -> tuple[LayerCache, torch.Tensor, torch.Tensor]:
    """A cache with 5 tokens of 2 rows, fed in expanding mode, and the next token."""
    cache = LayerCache(2, 4, max_length=most, window_size=window, num_sinks=sinks)
    key, value = given_tokens(2, 5, 0)
    cached = CachedLayer.of(CacheSlot(cache), cache)
    with torch.no_grad():
        _, cached.contents = cached.append(key, value, step_of(cache.contents, key, None))
    cached.publish()
    return cache, *given_tokens(2, 1, 5)


@pytest.mark.parametrize(("most", "window", "sinks"), [(None, None, 0), (9, None, 0), (None, 4, 2)])
def test_a_step_of_decoding_takes_few_calls(most: int | None, window: int | None, sinks: int) -> None:
    cache, key, value = filled(most, window, sinks)
    cached = CachedLayer.of(CacheSlot(cache), cache)
    step = step_of(cache.contents, key, None)
    with torch.inference_mode():
        calls = calls_by_file(lambda: cached.append(key, value, step))
    assert sum(calls.values()) <= 4, calls
    assert calls.keys() == {"cache/cached_layer.py", "cache/append_uniform.py", "cache/lease.py"}


@pytest.mark.parametrize(
    ("most", "error", "message", "change"),
    [
        (9, ShapeError, "expected 2 rows", lambda key, step: (key[:1], step)),
        (9, DtypeError, "torch.float64", lambda key, step: (key.double(), step)),
        (9, DeviceError, "on meta", lambda key, step: (key.to("meta"), step)),
        (9, CacheStateError, "row lengths", lambda key, step: (key, replace(step, past_lengths=Lengths((4,))))),
        (5, CacheFullError, "at most 5 tokens .* got 6", lambda key, step: (key, step)),
    ],
)
def test_what_does_not_continue_is_refused(most: int, error: type[Exception], message: str, change: Callable) -> None:
    # The window gives the buffer more slots than there may be tokens.
    cache, key, value = filled(most, window=4)
    cached = CachedLayer.of(CacheSlot(cache), cache)
    key, step = change(key, step_of(cache.contents, key, None))
    state = cache.contents.state
    with torch.no_grad():
        assert append_uniform(state, key, value, step, cache.spec) is None
        with pytest.raises(error, match=message):
            cached.append(key, value, step)
    assert state.buffers.lease.holder is state.version, "a refusal leaves the lease where it was"


def test_gradients_and_forks_and_rows_of_their_own_go_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, key, value = filled()
    cached = CachedLayer.of(CacheSlot(cache), cache)
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
        cached.append(key, value, step)
    assert events == ["copied, since others may read the buffer before"]
