"""Inputs without tokens, biases without dimensions, steps of another kind, and values that are not tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.conversations import assert_same
from tests.integration.builders import decoder
from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens
from transformer import KVCache, MultiHeadAttention
from transformer.errors import ArgumentError

X = tokens(2, 5, 16)
REAL = padding([(0, 5), (1, 3)], 5)


def attention(**more: Any) -> MultiHeadAttention:
    return build(Options(num_groups=4, **more), "MHA").eval()


# --- no tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("return_weights", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shape", [(2, 3, 0), (2, 1, 0), (2, 0, 4), (0, 3, 4), (0, 0, 0)])
def test_a_source_or_queries_of_no_tokens(
    shape: tuple[int, int, int], softcap: float | None, return_weights: bool, recorded: bool, cached: bool
) -> None:
    """Who sees nothing gets 0 before the output projection."""
    batch, length, keys = shape
    module = attention(causal=False, softcap=softcap)
    module.use_kv_cache = cached
    x, source = tokens(batch, length, 16), tokens(batch, keys, 16)
    with torch.set_grad_enabled(recorded):
        out = module(x, source, return_weights=return_weights)
    if return_weights:
        out, weights = out
        assert weights.shape == (batch, module.num_heads, length, keys)
    assert out.shape == x.shape
    assert_same(out, module.out_proj(torch.zeros_like(x)))


@pytest.mark.parametrize("scheme", ["none", "rotary halves", "alibi"])
def test_a_traced_chunk_of_no_tokens_with_sinks(scheme: str) -> None:
    module, x = attention(scheme=SCHEMES[scheme], window_size=2, num_sinks=1), tokens(2, 0, 16)
    module.use_kv_cache = False
    assert make_fx(lambda x: module(x))(x)(x).shape == x.shape


# --- biases of no dimension -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, REAL])
@pytest.mark.parametrize("scheme", ["none", "alibi"])
@pytest.mark.parametrize("bias", [torch.tensor(-2.1, dtype=torch.float64), torch.tensor(True), torch.tensor(False)])
def test_a_number_stands_for_every_score(bias: Tensor, scheme: str, mask: Tensor | None) -> None:
    module = attention(scheme=SCHEMES[scheme], window_size=2, num_sinks=1)
    module.use_kv_cache = False
    expected = module(X, attention_mask=mask, attn_bias=bias.expand(5, 5))
    assert_same(module(X, attention_mask=mask, attn_bias=bias), expected)
    traced = make_fx(lambda x: module(x, attention_mask=mask, attn_bias=bias))(X)
    assert_same(traced(X), expected)


# --- steps ----------------------------------------------------------------------------------------------------------


def test_a_step_that_was_planned_under_fake_tensors_is_refused() -> None:
    """It has no numbers of tokens: an eager call would take it for one of no tokens."""
    module = attention()
    module.use_kv_cache = False
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        step = module.plan(mode.from_tensor(X))
    with pytest.raises(ArgumentError, match="plan"):
        module(X, step=step)


def test_a_step_serves_layers_of_other_dtypes() -> None:
    """None of them turns its heads by angles that were rounded for another one."""
    narrow, wide = attention(scheme=SCHEMES["rotary halves"]).float(), attention(scheme=SCHEMES["rotary halves"])
    narrow.use_kv_cache = wide.use_kv_cache = False
    wide.position = narrow.position
    step = wide.plan(X)
    narrow(X.float(), step=step)
    assert torch.equal(wide(X, step=step), wide(X))


# --- no tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [[[0.0]], 0.0, np.zeros((5, 5))])
def test_a_bias_that_is_no_tensor_is_refused(bias: Any) -> None:
    with pytest.raises(ArgumentError, match="attn_bias: expected a tensor"):
        attention()(X, attn_bias=bias)
    module = attention(causal=False)
    with pytest.raises(ArgumentError, match="attn_bias: expected a tensor"):
        module(X, X, attn_bias=bias)


@pytest.mark.parametrize("step", [0, "step", ()])
def test_what_is_no_step_is_refused(step: Any) -> None:
    with pytest.raises(ArgumentError, match=r"step: expected None or what plan\(\) gives"):
        attention()(X, step=step)


@pytest.mark.parametrize("layers", [3, [], [2], [-1], [True], [0.0], [[0]], "0"])
def test_layers_that_are_no_indices_are_refused(layers: Any) -> None:
    with pytest.raises(ArgumentError, match="layers: expected indices from 0 to 1"):
        decoder().enable_cache(layers=layers)


def test_conversations_of_what_is_none_are_refused() -> None:
    cache = KVCache(num_layers=1, num_kv_heads=2, head_dim=4)
    for wrong in (None, 3):
        with pytest.raises(ArgumentError, match="rows: expected indices"):
            cache.select(wrong)
        with pytest.raises(ArgumentError, match=r"model: expected a torch\.nn\.Module"):
            KVCache.from_model(wrong)
    with pytest.raises(ArgumentError, match="caches: expected KVCaches"):
        KVCache.join([cache, 1])
