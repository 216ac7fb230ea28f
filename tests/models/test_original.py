"""The model of Attention Is All You Need, against `torch.nn` and the paper's formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same
from transformer.attention import Attention
from transformer.blocks import FeedForward
from transformer.models import EncoderDecoderConfig, EncoderDecoderTransformer

D, HEADS, FF, VOCAB = 16, 4, 24, 11
SMALL = {"src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB, "d_model": D, "num_heads": HEADS, "d_ff": FF}


def test_shape_of_the_base_model() -> None:
    """Table 3 of the paper: N = 6, 512 wide, 2048 in between, 8 heads, dropout 0.1, about 65 million parameters."""
    config = EncoderDecoderConfig.original()
    assert (config.num_layers, config.decoder_layers, config.dropout) == (6, 6, 0.1)
    with torch.device("meta"):
        model = EncoderDecoderTransformer.from_config(config)
    attention, norm, feed_forward = 4 * 512 * 512, 2 * 512, 2 * 512 * 2048 + 2048 + 512
    encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
    assert sum(each.numel() for each in model.parameters()) == 37_000 * 512 + 6 * (encoder + decoder)
    assert 60e6 < 37_000 * 512 + 6 * (encoder + decoder) < 66e6
    assert model.source_embedding.tokens.weight is model.target_embedding.tokens.weight is model.head.proj.weight
    assert config.embedding_scale == math.sqrt(512)


def test_another_vocabulary() -> None:
    config = EncoderDecoderConfig.original(vocab_size=VOCAB)
    assert config == replace(EncoderDecoderConfig.original(), src_vocab_size=VOCAB, tgt_vocab_size=VOCAB)


def copy_attention(ours: Attention, theirs: nn.MultiheadAttention) -> None:
    assert [each.bias for each in (ours.q_proj, ours.k_proj, ours.v_proj, ours.out_proj)] == [None] * 4
    theirs.in_proj_weight.copy_(torch.cat([each.weight for each in (ours.q_proj, ours.k_proj, ours.v_proj)]))
    theirs.out_proj.weight.copy_(ours.out_proj.weight)
    theirs.in_proj_bias.zero_()
    theirs.out_proj.bias.zero_()


def copy_feed_forward(ours: FeedForward, theirs: nn.Module) -> None:
    for mine, name in ((ours.up_proj, "linear1"), (ours.down_proj, "linear2")):
        getattr(theirs, name).load_state_dict(mine.state_dict())


def sinusoids(length: int) -> Tensor:
    """Section 3.5 of the paper."""
    table = torch.empty(length, D, dtype=torch.float64)
    for position in range(length):
        for i in range(D // 2):
            angle = position / 10000 ** (2 * i / D)
            table[position, 2 * i], table[position, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table


@pytest.mark.parametrize("num_layers", [1, 2])
@torch.no_grad()
def test_equal_to_the_layers_of_torch(num_layers: int) -> None:
    config = replace(
        EncoderDecoderConfig.original(), **SMALL, num_layers=num_layers, embedding_scale=math.sqrt(D), norm_eps=1e-5
    )
    torch.manual_seed(0)
    model = EncoderDecoderTransformer.from_config(config).double().eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) / 8)
    table = model.head.proj.weight
    source, target = torch.randint(VOCAB, (2, 5)), torch.randint(VOCAB, (2, 7))

    x = table[source] * math.sqrt(D) + sinusoids(5)
    for block in model.encoder.blocks:
        layer = nn.TransformerEncoderLayer(D, HEADS, FF, 0.1, "relu", batch_first=True).double().eval()
        copy_attention(block.attention, layer.self_attn)
        copy_feed_forward(block.feed_forward, layer)
        copy_norms(block, layer, 2)
        x = layer(x)
    y = table[target] * math.sqrt(D) + sinusoids(7)
    causal = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    for block in model.decoder.blocks:
        layer = nn.TransformerDecoderLayer(D, HEADS, FF, 0.1, "relu", batch_first=True).double().eval()
        copy_attention(block.attention, layer.self_attn)
        copy_attention(block.cross_attention, layer.multihead_attn)
        copy_feed_forward(block.feed_forward, layer)
        copy_norms(block, layer, 3)
        y = layer(y, x, tgt_mask=causal)
    assert_same(model(source, target), y @ table.T)


def copy_norms(block: nn.Module, layer: nn.Module, number: int) -> None:
    norms = [each for each in block.modules() if type(each).__name__ == "LayerNorm"]
    assert len(norms) == number
    for index, norm in enumerate(norms, 1):
        getattr(layer, f"norm{index}").load_state_dict(norm.state_dict())
