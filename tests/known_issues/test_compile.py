"""Compilation by `torch.compile`: right results, and a bounded number of compilations."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.conversations import assert_same
from tests.oracle import Options
from tests.setups import SCHEMES, build, tokens

TOKENS = 200
WARM = 20
"""Tokens after which nothing more may be compiled."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"window_size": 8, "num_sinks": 2}],
    ids=["expanding", "sliding"],
)
def test_a_compiled_step_stops_compiling(options: dict) -> None:
    """Issues: torchtune#1663, transformers#44609 #37908. A Python integer in the step made the compiler recompile for
    every token. Over 200 tokens nothing is compiled after the first 20, no limit is hit, and every output is right."""
    module, plain = (build(Options(scheme=SCHEMES["rotary halves"], **options)) for _ in range(2))
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter)
    compilations = []
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for step in range(TOKENS):
            x = tokens(1, 1, 16, seed=step)
            assert_same(compiled(x), plain(x))
            compilations.append(counter.frame_count)
    assert compilations[WARM] == compilations[-1]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"window_size": 3}], ids=["whole", "window"])
@pytest.mark.parametrize("scheme", ["none", "rotary halves", "alibi"])
def test_a_whole_sequence_is_one_graph_of_any_length(scheme: str, options: dict) -> None:
    """Issues: transformers#44609 #37908. Without a cache the module is one graph, also for a second and a third
    length."""
    module = build(Options(cached=False, scheme=SCHEMES[scheme], **options))
    compiled = torch.compile(module, backend=CompileCounter(), fullgraph=True)
    with torch.no_grad():
        for length in (6, 6, 9, 7):
            x = tokens(2, length, 16, seed=length)
            assert_same(compiled(x), module(x))
