"""Visibility of keys to queries (causal order, window, sinks), computed from positions.

A *position* is a token's absolute index in its row's sequence. A key position below zero (`NO_TOKEN`) marks a slot
without a visible token: padding, an unused slot, or an evicted token. Only this file implements the rule.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NO_TOKEN = -1
"""Position of a slot that holds no visible token."""


class Rule(NamedTuple):
    """Visibility rule: causal order, a window of `window` positions (None: no window), and sinks.

    `window` counts the query itself, so with 1 a query sees itself only. The first `num_sinks` tokens of a row stay
    visible in addition to the window (StreamingLLM, arXiv 2309.17453); without a window `num_sinks` has no effect.
    """

    causal: bool
    window: int | None = None
    num_sinks: int = 0

    @property
    def max_sink_distance(self) -> int | None:
        """Upper limit of the distance between a query and a sink, in positions; None without a window."""
        return None if self.window is None else self.window + self.num_sinks - 1


EVERYTHING = Rule(causal=False)
"""The rule that every token sees every other one."""


def visible(query: Tensor, key: Tensor, rule: Rule, prefix: Tensor | None = None) -> Tensor:
    """True where a query may see a key.

    `query` [..., L] and `key` [..., S] are int64 positions; gives bool [..., L, S]. `prefix` int64 [...]: so many first
    tokens of a row are visible to those before them too (prefix LM).
    """
    key = key.unsqueeze(-2)
    distance = query.unsqueeze(-1) - key
    result = (key >= 0).expand_as(distance)
    if rule.causal:
        ordered = distance >= 0
        result = result & (ordered if prefix is None else ordered | (key < prefix[..., None, None]))
    if rule.window is not None:
        in_window = distance.abs() < rule.window
        result = result & (in_window | (key < rule.num_sinks))
    return result


def beyond_window(query: Tensor, sink: Tensor, first_cached: Tensor, rule: Rule) -> Tensor:
    """True where a query sees a sink that is not among the keys of its window.

    `query` [..., L] and `sink` [..., n] are int64 positions; `first_cached` [..., 1] is the first position that the
    buffer still contains in addition to the sinks. Gives bool [..., L, n]. The window and these sinks together contain
    each visible key once.
    """
    evicted = (sink < first_cached).unsqueeze(-2)
    if rule.window is None:
        return visible(query, sink, rule) & evicted
    in_window = visible(query, sink, Rule(rule.causal, rule.window))
    return visible(query, sink, rule) & (evicted | ~in_window)


def all_visible(query: range, key: range, rule: Rule) -> bool:
    """True if each query of one run of positions sees each key of another, so that no mask is needed."""
    if rule.causal and key[-1] > query[0]:
        return False
    if rule.window is None:
        return True
    return query[-1] - key[0] < rule.window and key[-1] - query[0] < rule.window


def window_bounds(query: range, rule: Rule) -> tuple[int, int | None]:
    """The run of key positions [first, end) inside the window of any of these queries (`end` None: no bound)."""
    first = 0 if rule.window is None else query[0] - rule.window + 1
    if rule.causal:
        return first, query[-1] + 1
    return first, None if rule.window is None else query[-1] + rule.window


def positions(run: range, device: torch.device | None = None) -> Tensor:
    """A run of positions as an int64 tensor [len(run)], by default on the CPU."""
    return torch.arange(run.start, run.stop, device="cpu" if device is None else device)
