"""Weights of transformers' T5 and BERT in our blocks: the same hidden states of encoders and decoders."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, DynamicCache, EncoderDecoderCache, T5Config, T5Model

from tests.peers.models import copy_weights, fill, no_float32
from tests.setups import padding, tokens
from transformer import MultiHeadAttention
from transformer.blocks import BlockStack, DecoderBlock, EncoderBlock, FeedForward, GatedFeedForward, LayerNorm, RMSNorm
from transformer.positions import RelativePositionBias

EMBED_DIM, HIDDEN_DIM, NUM_HEADS, HEAD_DIM, LENGTH, SOURCE = 24, 40, 4, 7, 11, 9
close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
# Their name of the argument that takes a cache, which changed within version 5.
CACHE = "cache" if "cache" in signature(T5Model.forward).parameters else "past_key_values"

T5_ENCODER = {
    "attention.q_proj": "layer.0.SelfAttention.q",
    "attention.k_proj": "layer.0.SelfAttention.k",
    "attention.v_proj": "layer.0.SelfAttention.v",
    "attention.out_proj": "layer.0.SelfAttention.o",
    "attention_residual.norm_before": "layer.0.layer_norm",
    "feed_forward_residual.norm_before": "layer.1.layer_norm",
}
T5_DECODER = {
    **T5_ENCODER,
    "cross_attention.q_proj": "layer.1.EncDecAttention.q",
    "cross_attention.k_proj": "layer.1.EncDecAttention.k",
    "cross_attention.v_proj": "layer.1.EncDecAttention.v",
    "cross_attention.out_proj": "layer.1.EncDecAttention.o",
    "cross_attention_residual.norm_before": "layer.1.layer_norm",
    "feed_forward_residual.norm_before": "layer.2.layer_norm",
}
T5_FEED_FORWARD = {
    "relu": {"up_proj": "wi", "down_proj": "wo"},
    "gated-gelu": {"gate_proj": "wi_0", "up_proj": "wi_1", "down_proj": "wo"},
}
# Beside the layers: the bias is theirs only in the first one, and one object of ours in all.
T5_OTHERS = {
    "blocks.0.attention.position.embedding": "block.0.layer.0.SelfAttention.relative_attention_bias",
    "norm": "final_layer_norm",
}
BERT = {
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.out_proj": "attention.output.dense",
    "attention_residual.norm_after": "attention.output.LayerNorm",
    "feed_forward.up_proj": "intermediate.dense",
    "feed_forward.down_proj": "output.dense",
    "feed_forward_residual.norm_after": "output.LayerNorm",
}


class T5(NamedTuple):
    encoder: BlockStack
    decoder: BlockStack
    theirs: T5Model


def t5_stacks(activation: str) -> tuple[BlockStack, BlockStack]:
    norm = partial(RMSNorm, eps=1e-3)
    attention = partial(MultiHeadAttention, EMBED_DIM, NUM_HEADS, head_dim=HEAD_DIM, bias=False, scale=1.0)
    feed_forward = {
        "relu": partial(FeedForward, EMBED_DIM, HIDDEN_DIM, "relu", bias=False),
        "gated-gelu": partial(GatedFeedForward, EMBED_DIM, HIDDEN_DIM, "gelu_tanh"),
    }[activation]
    both_ways = RelativePositionBias(NUM_HEADS, 8, 10, bidirectional=True)
    backward = RelativePositionBias(NUM_HEADS, 8, 10)
    encoder = [EncoderBlock(attention(position=both_ways), feed_forward(), norm) for _ in range(2)]
    decoder = [
        DecoderBlock(
            attention(apply_causal_mask=True, position=backward), feed_forward(), norm, cross_attention=attention()
        )
        for _ in range(3)
    ]
    return BlockStack(encoder, norm(EMBED_DIM)), BlockStack(decoder, norm(EMBED_DIM))


@pytest.fixture(params=T5_FEED_FORWARD)
def t5(request: pytest.FixtureRequest) -> T5:
    config = T5Config(
        vocab_size=8,
        d_model=EMBED_DIM,
        d_kv=HEAD_DIM,
        d_ff=HIDDEN_DIM,
        num_heads=NUM_HEADS,
        num_layers=2,
        num_decoder_layers=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=10,
        layer_norm_epsilon=1e-3,
        feed_forward_proj=request.param,
    )
    theirs = T5Model(config).double().eval()
    fill(theirs)
    encoder, decoder = (stack.double().eval() for stack in t5_stacks(request.param))
    for ours, other, names in ((encoder, theirs.encoder, T5_ENCODER), (decoder, theirs.decoder, T5_DECODER)):
        last = f"layer.{1 if ours is encoder else 2}.DenseReluDense."
        feed_forward = {f"feed_forward.{own}": last + name for own, name in T5_FEED_FORWARD[request.param].items()}
        copy_weights(ours, other, "block", names | feed_forward, T5_OTHERS)
    return T5(encoder, decoder, theirs)


def close_layers(ours: BlockStack, states: tuple[Tensor, ...], real: Tensor, **more: Tensor) -> None:
    """Each layer alone: from their hidden states before it to those after it, the last with the final norm if any."""
    outs = [block(before, attention_mask=real, **more) for block, before in zip(ours.blocks, states[:-1], strict=True)]
    if ours.norm is not None:
        outs[-1] = ours.norm(outs[-1])
    for out, after in zip(outs, states[1:], strict=True):
        close(out[real], after[real])


@torch.no_grad()
def test_t5(t5: T5) -> None:
    """Each layer, then both stacks; source rows padded on the right and whole, target rows on the left and whole."""
    x, real = tokens(2, LENGTH, EMBED_DIM), padding([(4, 7), (0, LENGTH)], LENGTH)
    source, source_real = tokens(2, SOURCE, EMBED_DIM, seed=1), padding([(0, SOURCE), (0, 5)], SOURCE)
    with no_float32():
        theirs = t5.theirs(
            inputs_embeds=source,
            attention_mask=source_real.long(),
            decoder_inputs_embeds=x,
            decoder_attention_mask=real.long(),
            output_hidden_states=True,
        )
    encoded = theirs.encoder_last_hidden_state
    close_layers(t5.encoder, theirs.encoder_hidden_states, source_real)
    close_layers(t5.decoder, theirs.decoder_hidden_states, real, source=encoded, source_mask=source_real)

    own_encoded = t5.encoder(source, attention_mask=source_real)
    close(own_encoded[source_real], encoded[source_real])
    out = t5.decoder(x, own_encoded, attention_mask=real, source_mask=source_real)
    close(out[real], theirs.last_hidden_state[real])


@pytest.mark.parametrize("lengths", [[1] * LENGTH, [5, 1, 1, 3, 1]])
@torch.no_grad()
def test_t5_decoder_in_chunks(t5: T5, lengths: list[int]) -> None:
    """Against their one shot, and against their own generation with the same chunks."""
    x, encoded = tokens(2, LENGTH, EMBED_DIM), tokens(2, SOURCE, EMBED_DIM, seed=1)
    real, source_real = padding([(4, 7), (0, LENGTH)], LENGTH), padding([(0, SOURCE), (0, 5)], SOURCE)
    source = {"encoder_hidden_states": encoded, "encoder_attention_mask": source_real.long()}
    for block in t5.decoder.blocks:
        block.attention.use_kv_cache = block.cross_attention.use_kv_cache = True
    config = t5.theirs.decoder.config
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    with no_float32():
        whole = t5.theirs.decoder(inputs_embeds=x, attention_mask=real.long(), **source).last_hidden_state
    end = 0
    for length in lengths:
        new, end = slice(end, end + length), end + length
        given = {"inputs_embeds": x[:, new], "attention_mask": real[:, :end].long(), CACHE: cache, "use_cache": True}
        with no_float32():
            step = t5.theirs.decoder(**given, **source).last_hidden_state
        mask = real[:, new]
        out = t5.decoder(x[:, new], encoded, attention_mask=mask, source_mask=source_real)
        close(out[mask], whole[:, new][mask])
        close(out[mask], step[mask])


@torch.no_grad()
def test_bert() -> None:
    """Each layer, then the stack, with a row padded on the right, one on the left and one whole."""
    config = BertConfig(
        vocab_size=8,
        hidden_size=EMBED_DIM,
        intermediate_size=HIDDEN_DIM,
        num_attention_heads=NUM_HEADS,
        num_hidden_layers=3,
        layer_norm_eps=1e-3,
    )
    theirs = BertModel(config, add_pooling_layer=False).double().eval()
    fill(theirs)
    norm = partial(LayerNorm, eps=1e-3)
    ours = BlockStack(
        EncoderBlock(
            MultiHeadAttention(EMBED_DIM, NUM_HEADS), FeedForward(EMBED_DIM, HIDDEN_DIM), norm, placement="after"
        )
        for _ in range(3)
    )
    ours.double().eval()
    copy_weights(ours, theirs, "encoder.layer", BERT, {})
    real = padding([(0, 6), (4, 7), (0, LENGTH)], LENGTH)
    expected = theirs(torch.randint(8, (3, LENGTH)), attention_mask=real.long(), output_hidden_states=True)
    states = expected.hidden_states
    close_layers(ours, states, real)
    close(ours(states[0], attention_mask=real)[real], expected.last_hidden_state[real])
