"""Whole models as one graph: a forward without caches, and decoding over a frozen layout without recompiling."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from tests.cache.test_static_layout import graphs
from tests.conversations import assert_same
from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from tests.setups import padding
from transformer import DecoderOnlyTransformer
from transformer.models import UMT5Config, UMT5Model

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
@torch.inference_mode()
def test_encoder_decoder() -> None:
    """Forward as a whole, and the decoder's steps over sources of different lengths that were read once."""
    model, tokens = encoder_decoder("mqa alibi, window and sinks"), ids(2, STEPS + 2)
    source, real = ids(2, 5, VOCAB + 2), padding([(0, 5), (1, 3)], 5)
    expected = model(source, tokens, real)
    compiled = graphs(model)
    assert_same(compiled(source, tokens), model(source, tokens))
    assert counters["stats"]["unique_graphs"] == 1
    states = model.encode(source, real)
    model.enable_cache(max_length=STEPS + 2)
    outs = [model.decode(tokens[:, :2], states, real)]
    model.kv_cache.freeze_layout()
    step = graphs(model.decode)
    outs += [step(tokens[:, at : at + 1], states, real) for at in range(2, STEPS + 2)]
    assert counters["stats"]["unique_graphs"] == 1
    assert_same(model.head(torch.cat(outs, 1)), expected)


@pytest.mark.slow
@torch.inference_mode()
def test_umt5() -> None:
    """A relative bias in each layer, a gated feed-forward, and one table for the embedding and the head."""
    config = UMT5Config(vocab_size=30, d_model=16, head_dim=4, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=4)
    model, tokens, source = UMT5Model(config).double().eval(), 2 + ids(2, STEPS + 2, 28), 2 + ids(2, 5, 28)
    expected = model(source, tokens)
    pair = model.transformer
    states = model.encoder(source)
    pair.enable_cache(max_length=STEPS + 2)
    outs = [pair.decode(tokens[:, :2], states)]
    pair.kv_cache.freeze_layout()
    step = graphs(pair.decode)
    outs += [step(tokens[:, at : at + 1], states) for at in range(2, STEPS + 2)]
    assert counters["stats"]["unique_graphs"] == 1
    assert_same(model.lm_head(torch.cat(outs, 1)), expected)


@pytest.mark.slow
@torch.inference_mode()
def test_a_whole_encoder_decoder_forward_is_a_step_too() -> None:
    model, source, tokens = encoder_decoder(), ids(2, 4), ids(2, 8)
    expected = model(source, tokens)
    model.enable_cache(max_length=8)
    outs = [model(source, tokens[:, :2])]
    model.kv_cache.freeze_layout()
    compiled = graphs(model)
    outs += [compiled(source, tokens[:, at : at + 1]) for at in range(2, 8)]
    assert counters["stats"]["unique_graphs"] == 1
    assert_same(torch.cat(outs, 1), expected)


@pytest.mark.slow
@torch.inference_mode()
def test_models_with_other_numbers_of_heads_in_one_process() -> None:
    """The compiler then takes the number of heads to be a symbol, of which SDPA takes no comparison."""
    torch.compiler.reset()
    token = torch.tensor([[3]])
    for heads, groups in ((4, 2), (6, 3), (4, 4), (2, 1)):
        model = DecoderOnlyTransformer(30, 8 * heads, heads, 16, 1, attention="gqa", num_groups=groups).eval()
        expected = model(torch.tensor([[5, 7, 2, 3]]))[:, -1:]
        model.enable_cache(max_length=16)
        model(torch.tensor([[5, 7, 2]]))
        model.kv_cache.freeze_layout()
        compiled = torch.compile(model, fullgraph=True, backend="eager")(token)
        torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)
