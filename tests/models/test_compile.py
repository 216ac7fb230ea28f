"""Whole models as one graph: an uncached forward, and decoding over a fixed layout without compiling anew."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from tests.cache.test_static import graphs
from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from tests.setups import padding
from tests.talks import assert_same

STEPS = 20


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gqa relative, pattern", "mqa sinusoidal", "mha learned, after"])
@torch.inference_mode()
def test_decoder_only(variant: str) -> None:
    model, tokens = decoder_only(variant), ids(2, STEPS + 4)
    expected = model(tokens)
    compiled = graphs(model)
    assert_same(compiled(tokens), expected)
    assert counters["stats"]["unique_graphs"] == 1
    model.enable_cache(max_length=STEPS + 4)
    outs = [model(tokens[:, :4])]
    model.kv_cache.freeze_layout()
    compiled = graphs(model)
    outs += [compiled(tokens[:, at : at + 1]) for at in range(4, STEPS + 4)]
    assert counters["stats"]["unique_graphs"] == 1
    assert_same(torch.cat(outs, 1), expected)
    assert model.kv_cache.length == STEPS + 4


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mqa alibi, window and sinks", "mqa sinusoidal"])
@torch.inference_mode()
def test_encoder_decoder(variant: str) -> None:
    model, tokens = encoder_decoder(variant), ids(2, STEPS + 2)
    source, real = ids(2, 5, VOCAB + 2), padding([(0, 5), (1, 3)], 5)
    expected = model(source, tokens, real)
    compiled = graphs(model)
    assert_same(compiled(source, tokens, real), expected)
    assert counters["stats"]["unique_graphs"] == 1
    model.enable_cache(max_length=STEPS + 2)
    outs = [model(source, tokens[:, :2], real)]
    model.kv_cache.freeze_layout()
    compiled = graphs(model)
    outs += [compiled(source, tokens[:, at : at + 1], real) for at in range(2, STEPS + 2)]
    assert counters["stats"]["unique_graphs"] == 1
    assert_same(torch.cat(outs, 1), expected)
