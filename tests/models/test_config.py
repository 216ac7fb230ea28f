"""Configurations of models: refusals, and conversion to a dict and back."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from tests.models.variants import SHAPE, VARIANTS, VOCAB, decoder_only, encoder_decoder, ids
from transformer.errors import ConfigurationError
from transformer.models import DecoderOnlyConfig, DecoderOnlyTransformer, EncoderDecoderConfig
from transformer.models import EncoderDecoderTransformer as EncoderDecoder
from transformer.positions import LinearScaling

NAN, INF = float("nan"), float("inf")

REFUSED = [
    ("vocab_size", {"vocab_size": 0}),
    ("d_model", {"d_model": -4}),
    ("num_heads", {"num_heads": True}),
    ("d_ff", {"d_ff": 2.0}),
    ("num_layers", {"num_layers": 0}),
    ("d_model", {"d_model": 18}),
    ("attention", {"attention": "linear"}),
    ("num_groups", {"attention": "gqa"}),
    ("num_groups", {"num_groups": 2}),
    ("num_groups", {"attention": "gqa", "num_groups": 3}),
    ("head_dim", {"head_dim": 0}),
    ("position", {"position": "rope"}),
    ("max_length", {"position": "learned"}),
    ("max_length", {"max_length": 8}),
    ("norm", {"norm": "batch"}),
    ("norm_placement", {"norm_placement": "between"}),
    ("residual", {"residual": "serial"}),
    ("residual", {"residual": "parallel", "norm_placement": "after"}),
    ("norm_eps", {"norm_eps": NAN}),
    ("feed_forward", {"feed_forward": "sparse"}),
    ("activation", {"activation": "tanh"}),
    ("dropout", {"dropout": 1.0}),
    ("dropout", {"dropout": NAN}),
    ("window_size", {"window_size": 0}),
    ("window_size", {"layer_pattern": "sliding full"}),
    ("window_size", {"window_size": 3, "layer_pattern": "full"}),
    ("layer_pattern", {"window_size": 3, "layer_pattern": "sliding wide"}),
    ("pattern", {"layer_pattern": ""}),
    ("num_sinks", {"num_sinks": 2}),
    ("num_sinks", {"window_size": 3, "num_sinks": -1}),
    ("embedding_scale", {"embedding_scale": INF}),
    ("logit_scale", {"logit_scale": 0.0}),
    ("residual_scale", {"residual_scale": 0.0}),
    ("rotary_sliding_base", {"rotary_sliding_base": 0.0, "window_size": 2}),
    ("rotary_sliding_base", {"rotary_sliding_base": 9.0}),
    ("rotary_sliding_base", {"rotary_sliding_base": 9.0, "window_size": 2, "position": "alibi"}),
    ("position_pattern", {"position_pattern": "rotary alibi"}),
    ("position_pattern", {"position_pattern": ""}),
    ("position_pattern", {"position_pattern": ["none"]}),
    ("position_pattern", {"position_pattern": "learned none", "position": "learned", "max_length": 9}),
    ("pattern", {"position_pattern": "rotary rotary none"}),
    ("logit_softcap", {"logit_softcap": -1.0}),
    ("softcap", {"softcap": NAN}),
    ("scale", {"scale": NAN}),
    ("base", {"rotary_base": 0.0}),
    ("rotary_dim", {"rotary_dim": 3}),
    ("stop_tokens", {"stop_tokens": [1]}),
    ("stop_tokens", {"stop_tokens": (-1,)}),
    ("pad_token", {"pad_token": -1}),
]


@pytest.mark.parametrize(("name", "options"), REFUSED)
def test_refusals_name_the_field(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=rf"{name}"):
        DecoderOnlyTransformer(**{"vocab_size": VOCAB, **SHAPE, **options})
    if "vocab_size" not in options:
        with pytest.raises(ConfigurationError, match=rf"{name}"):
            EncoderDecoder(**{"src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB, **SHAPE, **options})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("src_vocab_size", {"src_vocab_size": 0}),
        ("tgt_vocab_size", {"tgt_vocab_size": None}),
        ("num_decoder_layers", {"num_decoder_layers": 0}),
        ("shared_embeddings", {"src_vocab_size": VOCAB + 1, "shared_embeddings": True}),
        ("start_token", {"start_token": VOCAB}),
        ("start_token", {"start_token": -1}),
        ("start_token", {"start_token": None}),
        ("residual", {"residual": "parallel"}),
    ],
)
def test_an_encoder_decoder_refuses_more(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{name}"):
        EncoderDecoderConfig(**{"src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB, **SHAPE, **options})


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_model_is_its_configuration_and_its_weights(variant: str) -> None:
    """Written down as plain numbers and words, built again and given the weights, it gives the same logits."""
    tokens = ids(2, 5)
    for model, given in ((decoder_only(variant), (tokens,)), (encoder_decoder(variant), (tokens, tokens))):
        config = type(model.config)(**model.config.to_dict())
        assert config == model.config
        again = type(model).from_config(config).double().eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(*given), model(*given))


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        DecoderOnlyConfig(VOCAB, **SHAPE).vocab_size = 2


def test_what_the_words_build() -> None:
    """Each option reaches the modules that it names."""
    model = encoder_decoder("gqa relative, pattern", num_decoder_layers=3, dropout=0.25)
    windows = [block.attention.window_size for block in model.decoder.blocks]
    assert windows == [2, None, 2]
    assert [block.attention.window_size for block in model.encoder.blocks] == [None, None]
    first, second, _ = (block.attention for block in model.decoder.blocks)
    assert first.position is second.position
    assert not first.position.bidirectional
    assert model.encoder.blocks[0].attention.position.bidirectional
    assert model.decoder.blocks[0].cross_attention.position is None
    assert (first.num_groups, first.dropout) == (2, 0.25)
    per_layer = decoder_only("mha relative per layer").decoder.blocks
    assert per_layer[0].attention.position is not per_layer[1].attention.position
    options = {"layer_pattern": "sliding full", "window_size": 2, "num_layers": 4, "rotary_sliding_base": 9.0}
    model = decoder_only(**options, position_pattern="rotary rotary rotary none", rotary_scaling=LinearScaling(2.0))
    first, second, third, fourth = (block.attention.position for block in model.decoder.blocks)
    assert first is third
    assert (first.base, first.scaling, second.base, second.scaling) == (9.0, None, 10000.0, LinearScaling(2.0))
    assert fourth is None
    sinks = decoder_only(window_size=3, num_sinks=2, layer_pattern="sliding full").decoder.blocks
    assert [block.attention.num_sinks for block in sinks] == [2, 0]
