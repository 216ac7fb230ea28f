"""Any layout of tokens, with any rules, scheme, window, mask and mode: against plain loops, and traced."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tests.attention.test_rules import (
    PerHead,
    capped,
    dilated,
    dilated_by_loops,
    near,
    near_by_loops,
    per_head_by_loops,
)
from tests.conversations import assert_same
from tests.oracle import Conversation, Options
from tests.setups import SCHEMES, build, tokens
from transformer.attention import TokenLayout
from transformer.kernels import tuned

MASKS = ((None, None), (dilated, dilated_by_loops), (PerHead(4), per_head_by_loops))
SCORES = ((None, None), (near, near_by_loops), (capped, lambda score, *_: 2 * math.tanh(score / 2)))
BIASES = ("alibi", "t5 causal", "t5 bidirectional")


def runs(numbers: list[int]) -> list[tuple[int, int]]:
    """First and last column of each run of equal numbers but 0."""
    begins = [i for i in range(len(numbers)) if i == 0 or numbers[i] != numbers[i - 1]]
    pairs = zip(begins, [*begins[1:], len(numbers)], strict=True)
    return [(begin, end) for begin, end in pairs if numbers[begin]]


def apart(module: torch.nn.Module, own: Options, x: Tensor, mode: bool | None, layout: TokenLayout) -> list[Tensor]:
    """Outputs and weights of each document alone, by loops, at their places."""
    batch, length = x.shape[:2]
    out, weights = torch.zeros_like(x), x.new_zeros(batch, own.num_heads, length, length)
    for row, numbers in enumerate(layout.segment_ids.tolist()):
        for begin, end in runs(numbers):
            ids = None if layout.position_ids is None else layout.position_ids[row : row + 1, begin:end].tolist()
            found = Conversation(module, own).call(x[row : row + 1, begin:end], None, mode, placed=ids)
            out[row, begin:end], weights[row, :, begin:end, begin:end] = found[0][0], found[1][0]
    return [out, weights]


@pytest.mark.slow
@settings(max_examples=60)
@given(st.randoms(use_true_random=False))
def test_any_layout_and_rules(random: Random) -> None:
    kind, scheme = (
        random.choice(("segments", "prefix", "positions")),
        random.choice(("none", "rotary partial", *BIASES)),
    )
    window, sinks = random.choice(((None, 0), (2, 0), (2, 2), (3, 1)))
    mode, batch, length = random.choice((None, True, False)), random.randint(1, 3), random.randint(1, 10)
    slides = mode is False or (mode is None and window is not None)
    cached = kind != "segments" and scheme not in BIASES and random.random() < 0.5
    plain = Options(num_groups=2, cached=cached, window_size=window, num_sinks=sinks, scheme=SCHEMES[scheme])
    plain = replace(plain, causal=kind == "prefix" or random.random() < 0.7)
    (mask_rule, shows), (score_rule, changed) = random.choice(MASKS), random.choice(SCORES)
    module = build(plain, mask_rule=mask_rule, score_rule=score_rule)
    own, x, real = replace(plain, shows=shows, changed=changed), tokens(batch, length, 16), None
    layout = TokenLayout()
    if (kind == "positions" or random.random() < 0.4) and not (sinks and slides):
        placed = [[random.randint(0, 60) for _ in range(length)] for _ in range(batch)]
        layout = layout._replace(position_ids=torch.tensor(placed))
    if kind == "segments":
        numbers = [[random.randint(0, 2) for _ in range(length)] for _ in range(batch)]
        layout = layout._replace(segment_ids=torch.tensor(numbers))
        expected = apart(module, own, x, mode, layout)
    else:
        if random.random() < 0.5:
            real = torch.tensor([[random.random() < 0.7 for _ in range(length)] for _ in range(batch)])
        lengths = [length] * batch if real is None else real.sum(-1).tolist()
        prefixes = [random.randint(0, each) for each in lengths] if kind == "prefix" else None
        layout = layout._replace(prefix_lengths=None if prefixes is None else torch.tensor(prefixes))
        ids = None if layout.position_ids is None else layout.position_ids.tolist()
        expected = [*Conversation(module, own).call(x, real, mode, prefixes=prefixes, placed=ids)]

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        return module(x, step=module.plan(x, mode, real, layout), return_weights=True)

    with torch.no_grad(), tuned(min_row_tokens=random.choice((0, 16))):
        assert_same([*call(x)], expected)
        module.kv_cache = None
        assert_same(module(x, step=module.plan(x, mode, real, layout)), expected[0])
        if not cached and not (sinks and slides):
            assert_same([*make_fx(call)(x)(x)], expected)
