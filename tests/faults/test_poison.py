"""NaN and infinities: without any effect in padding, and limited to their row in a real token."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conversations import NAN, cache_snapshot
from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens

POISONS = st.sampled_from((NAN, float("inf"), -float("inf"), 6e4))
SCHEME_NAMES = st.sampled_from(("none", "rotary halves", "alibi", "t5 causal"))
DTYPES = st.sampled_from((torch.float64, torch.float32, torch.float16, torch.bfloat16))


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[int, list[tuple[int, int]]]]:
    calls = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.sampled_from((1, 2, 4, 7)))
        counts = [draw(st.integers(0, length)) for _ in range(3)]
        calls.append((length, [(draw(st.integers(0, length - count)), count) for count in counts]))
    return calls


@settings(max_examples=60)
@given(conversations(), POISONS, SCHEME_NAMES, DTYPES, st.sampled_from((None, 1, 3)), st.booleans(), st.booleans())
def test_padding(
    calls: list[tuple[int, list[tuple[int, int]]]],
    poison: float,
    scheme: str,
    dtype: torch.dtype,
    window: int | None,
    recorded: bool,
    weights: bool,
) -> None:
    """Outputs, weights, gradients of the weights, and every bit of the cache."""
    options = Options(num_groups=2, scheme=SCHEMES[scheme], window_size=window, num_sinks=0 if window is None else 2)
    clean, dirty = build(options, dtype=dtype), build(options, dtype=dtype)
    losses = [torch.zeros(()), torch.zeros(())]
    for step, (length, spans) in enumerate(calls):
        x, mask = tokens(3, length, 16, seed=step, dtype=dtype), padding(spans, length)
        spoiled = x.masked_fill(~mask[..., None], poison)
        with torch.set_grad_enabled(recorded):
            answers = [
                module(given, attention_mask=mask, return_weights=weights)
                for module, given in ((clean, x), (dirty, spoiled))
            ]
        if not weights:
            answers = [(answer,) for answer in answers]
        for expected, actual in zip(*answers, strict=True):
            assert torch.equal(actual, expected)
            assert actual.isfinite().all()
        losses = [
            loss + sum(out.float().square().sum() for out in answer)
            for loss, answer in zip(losses, answers, strict=True)
        ]
        assert cache_snapshot(dirty) == cache_snapshot(clean)
    if recorded and any(count for _, spans in calls for _, count in spans):
        for loss in losses:
            loss.backward()
        for expected, actual in zip(clean.parameters(), dirty.parameters(), strict=True):
            assert (expected.grad is None) == (actual.grad is None)
            assert expected.grad is None or torch.equal(expected.grad, actual.grad)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=2),
    POISONS,
    DTYPES,
    st.booleans(),
    st.booleans(),
)
def test_padding_of_a_source(
    spans: list[tuple[int, int]], poison: float, dtype: torch.dtype, cached: bool, recorded: bool
) -> None:
    kv_mask = padding([(start, min(count, 4 - start)) for start, count in spans], 4)
    clean, dirty = (build(Options(causal=False, cached=cached), dtype=dtype) for _ in range(2))
    kv = tokens(2, 4, 16, seed=1, dtype=dtype)
    spoiled = kv.masked_fill(~kv_mask[..., None], poison)
    with torch.set_grad_enabled(recorded):
        for step in range(2):
            x = tokens(2, 2, 16, seed=2 + step, dtype=dtype)
            out = dirty(x, spoiled, kv_mask=kv_mask)
            assert torch.equal(out, clean(x, kv, kv_mask=kv_mask))
            assert out.isfinite().all()


@settings(max_examples=60)
@given(
    conversations(),
    POISONS,
    SCHEME_NAMES,
    st.sampled_from((None, 1, 3)),
    st.integers(0, 2),
    st.booleans(),
    st.booleans(),
)
def test_one_row(
    calls: list[tuple[int, list[tuple[int, int]]]],
    poison: float,
    scheme: str,
    window: int | None,
    row: int,
    masked: bool,
    recorded: bool,
) -> None:
    """A whole row spoiled, from the first call to the last: the others are bit-identical."""
    options = Options(num_groups=2, scheme=SCHEMES[scheme], window_size=window)
    clean, dirty = build(options), build(options)
    others = [other for other in range(3) if other != row]
    for step, (length, spans) in enumerate(calls):
        x, mask = tokens(3, length, 16, seed=step), padding(spans, length) if masked else None
        spoiled = x.clone()
        spoiled[row] = poison
        with torch.set_grad_enabled(recorded):
            expected, actual = clean(x, attention_mask=mask), dirty(spoiled, attention_mask=mask)
        assert torch.equal(actual[others], expected[others])
    if clean.kv_cache is not None:
        for name, tensor in clean.kv_cache.items():
            assert torch.equal(dirty.kv_cache[name][others], tensor[others])
