"""Masks: what a query may see, from positions alone.

A *position* is a token's absolute index in its row's sequence. A key position below zero (`NOTHING`) stands for a slot
without a token that may be seen: padding, unused, or let go. This file is the only place that knows the rule.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NOTHING = -1


@dataclass(frozen=True, slots=True)
class Rule:
    """Which keys a query sees: causal order, a window of `window` positions (None: no window), and the sinks.

    `window` counts the query itself, so 1 sees only itself. The first `num_sinks` tokens of a row stay visible beside
    the window (StreamingLLM, arXiv 2309.17453); without a window they mean nothing.
    """

    causal: bool
    window: int | None = None
    num_sinks: int = 0

    @property
    def max_sink_distance(self) -> int | None:
        """The farthest position from which a query meets a sink: distances to sinks never grow past it."""
        return None if self.window is None else self.window + self.num_sinks - 1


def visible(query: Tensor, key: Tensor, rule: Rule) -> Tensor:
    """True where a query may see a key.

    `query` [..., L] and `key` [..., S] are int64 positions; gives bool [..., L, S].
    """
    key = key.unsqueeze(-2)
    distance = query.unsqueeze(-1) - key
    seen = (key >= 0).expand_as(distance)
    if rule.causal:
        seen = seen & (distance >= 0)
    if rule.window is not None:
        sink_query = distance.abs() < rule.window
        seen = seen & (sink_query | (key < rule.num_sinks))
    return seen


def beyond_window(query: Tensor, sink: Tensor, held_from: Tensor, rule: Rule) -> Tensor:
    """True where a query sees a sink that its window does not show it.

    `query` [..., L], `sink` [..., n] int64 positions, `held_from` [..., 1] the first position that is still in the
    buffer beside the sinks; gives bool [..., L, n]. Together with the window alone, each visible key is met once.
    """
    evicted = (sink < held_from).unsqueeze(-2)
    if rule.window is None:
        return visible(query, sink, rule) & evicted
    in_window = visible(query, sink, Rule(rule.causal, rule.window))
    return visible(query, sink, rule) & (evicted | ~in_window)


def all_visible(query: range, key: range, rule: Rule) -> bool:
    """Whether every query of a run of positions sees every key of another, so that no mask is needed."""
    if rule.causal and key[-1] > query[0]:
        return False
    if rule.window is None:
        return True
    return query[-1] - key[0] < rule.window and key[-1] - query[0] < rule.window


def within_reach(query: range, rule: Rule) -> tuple[int, int | None]:
    """The run of key positions [first, end) that the window shows any of these queries (`end` None: no bound)."""
    first = 0 if rule.window is None else query[0] - rule.window + 1
    if rule.causal:
        return first, query[-1] + 1
    return first, None if rule.window is None else query[-1] + rule.window


def positions(run: range, device: torch.device | None = None) -> Tensor:
    """A run of positions as an int64 tensor [len(run)], by default on the CPU."""
    return torch.arange(run.start, run.stop, device="cpu" if device is None else device)
