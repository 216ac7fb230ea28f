"""Chunks without tokens or with padding only, in all modes: nothing changes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from tests.conversations import cache_snapshot
from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens

MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
KINDS = {"plain": {}, "sliding": {"window_size": 2}, "sinks": {"window_size": 2, "num_sinks": 2}}
HEADS = 4


def empty(module: nn.Module, mode: bool | None, held: int) -> None:
    """All forms of an empty chunk, after `held` cached tokens."""
    before = cache_snapshot(module)
    for masked, weights, biased in product((False, True), repeat=3):
        arguments = {
            "attention_mask": torch.ones(2, 0, dtype=torch.bool) if masked else None,
            "attn_bias": torch.zeros(2, HEADS, 0, held) if biased else None,
        }
        answer = module(tokens(2, 0, 16), None, mode, **arguments, return_weights=weights)
        out = answer[0] if weights else answer
        assert out.shape == (2, 0, 16)
        assert out.dtype == torch.float64
        if weights:
            assert answer[1].shape == (2, HEADS, 0, held)
        assert cache_snapshot(module) == before


@pytest.mark.slow
@pytest.mark.parametrize("grad", MODES)
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind: str, cached: bool, grad: str) -> None:
    for causal, mode, scheme in product((True, False), (None, True, False), ("none", "rotary halves", "t5 causal")):
        options = Options(causal=causal, cached=cached, scheme=SCHEMES[scheme], **KINDS[kind])
        module, straight = build(options), build(options)
        with MODES[grad]():
            empty(module, mode, 0)
            for step, length in enumerate((3, 1)):
                x = tokens(2, length, 16, seed=step)
                assert torch.equal(module(x, None, mode), straight(x, None, mode))
                empty(module, mode, module.kv_cache.cached_length if cached else 0)
        assert cache_snapshot(module) == cache_snapshot(straight)


@pytest.mark.parametrize("grad", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_alone(kind: str, grad: str) -> None:
    """The output is exactly 0, the cache is unchanged, and a window that was not given is not fixed."""
    for mode in (None, True, False):
        module, straight = (build(Options(scheme=SCHEMES["alibi"], **KINDS[kind])) for _ in range(2))
        nothing = padding([(0, 0), (0, 0)], 5)
        with MODES[grad]():
            for step, length in enumerate((3, 1, 2)):
                before = cache_snapshot(module)
                out, weights = module(tokens(2, 5, 16), None, mode, attention_mask=nothing, return_weights=True)
                assert not out.any()
                assert not weights.any()
                assert cache_snapshot(module) == before
                x = tokens(2, length, 16, seed=step)
                assert torch.equal(module(x, None, mode), straight(x, None, mode))
        assert cache_snapshot(module) == cache_snapshot(straight)


@pytest.mark.parametrize("grad", MODES)
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_no_tokens_over_a_source(cached: bool, grad: str) -> None:
    """No queries give no outputs, and the source is there for the next call."""
    options = Options(causal=False, cached=cached)
    module, straight = build(options), build(options)
    kv, kv_mask = tokens(2, 5, 16, seed=1), padding([(0, 5), (1, 3)], 5)
    with MODES[grad]():
        for weights, real in product((False, True), (None, kv_mask)):
            answer = module(tokens(2, 0, 16), kv, kv_mask=real, return_weights=weights)
            out = answer[0] if weights else answer
            assert out.shape == (2, 0, 16)
            if weights:
                assert answer[1].shape == (2, HEADS, 0, 5)
            x = tokens(2, 3, 16)
            assert torch.equal(module(x, kv, kv_mask=real), straight(x, kv, kv_mask=real))
