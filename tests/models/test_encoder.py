"""Encoder with transformers' BERT weights: equal states, and sentence vectors that are means of token states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from tests.peers.models import fill
from tests.setups import padding
from transformer.errors import ArgumentError, ConfigurationError, ShapeError
from transformer.models import EncoderTransformer, mean_pooled

VOCABULARY, LENGTH = 31, 9
BERT = {
    "position": "learned",
    "max_length": 12,
    "norm": "layer",
    "norm_eps": 1e-3,
    "norm_placement": "after",
    "feed_forward": "plain",
    "activation": "gelu",
    "attention_bias": True,
    "feed_forward_bias": True,
    "num_token_types": 2,
    "embedding_norm": True,
}
MODULES = {
    "embeddings.word_embeddings": "embedding.tokens",
    "embeddings.token_type_embeddings": "token_types.tokens",
    "embeddings.LayerNorm": "positions.norm",
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.output.dense": "attention.out_proj",
    "attention.output.LayerNorm": "attention_residual.norm_after",
    "intermediate.dense": "feed_forward.up_proj",
    "output.dense": "feed_forward.down_proj",
    "output.LayerNorm": "feed_forward_residual.norm_after",
}


def ours() -> EncoderTransformer:
    return EncoderTransformer(VOCABULARY, 24, 4, 40, 3, **BERT).eval()


def ids(rows: int = 3) -> Tensor:
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def with_their_weights(model: EncoderTransformer, theirs: nn.Module) -> EncoderTransformer:
    weights = {}
    for name, tensor in theirs.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module == "embeddings.position_embeddings":
            weights[next(key for key in model.state_dict() if key.startswith("positions.positions."))] = tensor
        elif module.startswith("encoder.layer."):
            _, _, index, inner = module.split(".", 3)
            weights[f"encoder.blocks.{index}.{MODULES[inner]}.{kind}"] = tensor
        else:
            weights[f"{MODULES[module]}.{kind}"] = tensor
    model.load_state_dict(weights)
    return model


@torch.no_grad()
@pytest.mark.parametrize("typed", [False, True])
def test_states(typed: bool) -> None:
    """Without padding, and with it: in float64, as theirs."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_attention_heads=4,
        intermediate_size=40,
        num_hidden_layers=3,
        max_position_embeddings=12,
        layer_norm_eps=1e-3,
    )
    theirs = BertModel(config, add_pooling_layer=False).double().eval()
    fill(theirs)
    model, tokens = with_their_weights(ours().double(), theirs), ids()
    types = (torch.arange(LENGTH) > 4).long().expand(3, -1) if typed else None
    for mask in (None, padding([(0, 9), (0, 6), (0, 2)], LENGTH)):
        expected = theirs(tokens, None if mask is None else mask.long(), types).last_hidden_state
        out, real = model(tokens, mask, types), slice(None) if mask is None else mask
        torch.testing.assert_close(out[real], expected[real], rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_sentence_is_alone() -> None:
    """Its vector does not depend on what pads it, on which side, or on its neighbours."""
    model, tokens = ours().double(), ids()
    alone = [
        mean_pooled(model(row[None, begin : begin + count]))[0]
        for row, (begin, count) in zip(tokens, SPANS, strict=True)
    ]
    mask = padding(SPANS, LENGTH)
    out = mean_pooled(model(tokens.where(mask, VOCABULARY + 5), mask), mask)
    torch.testing.assert_close(out, torch.stack(alone), rtol=0, atol=1e-10)


SPANS = [(0, 9), (3, 6), (0, 4)]


def test_a_mean_is_of_real_tokens() -> None:
    states = torch.tensor([[[1.0], [3.0], [float("nan")]], [[5.0], [6.0], [7.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert mean_pooled(states, mask).tolist() == [[2.0], [0.0]]
    assert mean_pooled(states[1:]).tolist() == [[6.0]]
    with pytest.raises(ShapeError, match="attention_mask"):
        mean_pooled(states, mask[:, 1:])


def test_what_is_refused() -> None:
    model, plain = ours(), EncoderTransformer(VOCABULARY, 24, 4, 40, 1)
    for error, name, call in (
        (ArgumentError, "input_ids", lambda: model(ids() + VOCABULARY)),
        (ArgumentError, "token_type_ids", lambda: model(ids(), None, ids())),
        (ShapeError, "token_type_ids", lambda: model(ids(), None, ids()[:, 1:])),
        (ArgumentError, "token_type_ids", lambda: plain(ids(), None, ids())),
        (ConfigurationError, "num_token_types", lambda: EncoderTransformer(8, 8, 2, 8, 1, num_token_types=-1)),
        (ConfigurationError, "window_size", lambda: EncoderTransformer(8, 8, 2, 8, 1, window_size=0)),
        (
            ConfigurationError,
            "first_norm",
            lambda: EncoderTransformer(8, 8, 2, 8, 1, norm_placement="after", first_norm=False),
        ),
    ):
        with pytest.raises(error, match=name):
            call()


def test_its_configuration_makes_the_same_model() -> None:
    assert EncoderTransformer.from_config(ours().config).config == ours().config
