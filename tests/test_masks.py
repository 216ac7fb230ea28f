"""Visibility rule, pair by pair, and its shortcuts for runs of positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformer.masks import NO_TOKEN, Rule, all_visible, beyond_window, visible, window_bounds

RULES = st.builds(
    Rule, causal=st.booleans(), window=st.none() | st.integers(1, 6), num_sinks=st.integers(0, 3)
)  # fmt: skip


def sees(q: int, k: int, rule: Rule) -> bool:
    if k < 0 or (rule.causal and k > q):
        return False
    return rule.window is None or abs(q - k) < rule.window or k < rule.num_sinks


@given(RULES, st.integers(0, 9), st.integers(1, 5))
def test_every_pair(rule: Rule, first: int, count: int) -> None:
    query, key = torch.arange(first, first + count), torch.arange(-1, 12)
    seen = visible(query, key, rule)
    for i, q in enumerate(query.tolist()):
        assert seen[i].tolist() == [sees(q, k, rule) for k in key.tolist()]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_counts_the_query_itself(window: int) -> None:
    """Issues: transformers#39408, mlx-lm#390, x-transformers `max_attend_past`. W showed W + 1 keys."""
    seen = visible(torch.tensor([5]), torch.arange(6), Rule(True, window))
    assert int(seen.sum()) == window
    assert seen[0, 6 - window :].all()


def test_a_slot_without_a_token_is_never_seen() -> None:
    key = torch.tensor([NO_TOKEN, 0, NO_TOKEN])
    assert visible(torch.tensor([0]), key, Rule(True, 1, 2)).tolist() == [[False, True, False]]


@given(RULES, st.integers(0, 9), st.integers(1, 4), st.integers(0, 9), st.integers(1, 4))
def test_short_cuts_agree_with_the_rule(rule: Rule, q: int, queries: int, k: int, keys: int) -> None:
    window_only = Rule(rule.causal, rule.window)
    query, key = range(q, q + queries), range(k, k + keys)
    seen = visible(torch.tensor([*query]), torch.tensor([*key]), window_only)
    assert all_visible(query, key, window_only) == bool(seen.all())
    first, end = window_bounds(query, window_only)
    outside = [position < first or (end is not None and position >= end) for position in key]
    assert not seen[:, torch.tensor(outside)].any()


@given(RULES, st.integers(0, 12), st.integers(0, 5))
def test_each_visible_key_is_met_once(rule: Rule, q: int, held_from: int) -> None:
    """By the window alone over what the buffer holds, or as a sink apart: together the rule, and never both."""
    query, key = torch.tensor([q]), torch.arange(15)
    in_buffer = visible(query, key.where(key >= held_from, NO_TOKEN), Rule(rule.causal, rule.window))[0]
    apart = beyond_window(query, key[: rule.num_sinks], torch.tensor([held_from]), rule)[0]
    assert not (in_buffer[: rule.num_sinks] & apart).any()
    together = in_buffer.clone()
    together[: rule.num_sinks] |= apart
    held = (key >= held_from) | (key < rule.num_sinks)
    assert together.tolist() == (visible(query, key, rule)[0] & held).tolist()
