"""Whole models of each kind, compared with plain loops over float64: in one shot, and in chunks with caches."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.blocks.loops import StackConversation, each, linear, norm
from tests.conversations import assert_same
from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from tests.oracle import Options, numbers
from tests.setups import SCHEMES, padding
from transformer.models import InputPositions

GQA = {"num_groups": 2, "scheme": SCHEMES["rotary halves"]}


def embedded(model: nn.Embedding, tokens: Tensor, positions: InputPositions) -> Tensor:
    """Rows of the table, with the norm of embeddings where the model has one."""
    table = numbers(model.weight)
    rows = torch.tensor([[table[token] for token in row] for row in tokens.tolist()], dtype=torch.float64)
    return rows if positions.norm is None else each(partial(norm, positions.norm), rows)


def logits_of(model: nn.Module, states: Tensor) -> Tensor:
    rows = [[linear(model.head.proj, vector) for vector in row] for row in numbers(states)]
    return torch.tensor(rows, dtype=torch.float64)


WINDOWS = {"attention": "gqa", "num_groups": 2, "window_size": 3, "layer_pattern": "sliding full"}
LAYERS: dict[str, tuple[dict[str, object], list[Options]]] = {
    "windows": ({}, [Options(window_size=3, **GQA), Options(**GQA)]),
    "a base of sliding layers, layers without positions": (
        {"num_layers": 4, "rotary_sliding_base": 9.0, "position_pattern": "rotary rotary none none"},
        [
            Options(window_size=3, **GQA | {"scheme": replace(SCHEMES["rotary halves"], base=9.0)}),
            Options(**GQA),
            Options(window_size=3, **GQA | {"scheme": None}),
            Options(**GQA | {"scheme": None}),
        ],
    ),
}


@pytest.mark.parametrize("lengths", [[7], [4, 1, 2]])
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_decoder_only(kind: str, lengths: list[int]) -> None:
    more, layers = LAYERS[kind]
    model = decoder_only(**WINDOWS | more, embedding_norm=True, head_bias=True)
    conversation = StackConversation(model.decoder, layers, "before", "silu")
    tokens, real = ids(2, 7), padding([(0, 7), (3, 4)], 7)
    if len(lengths) > 1:
        model.enable_cache()
    for part, mask in zip(tokens.split(lengths, 1), real.split(lengths, 1), strict=True):
        expected = logits_of(model, conversation.call(embedded(model.embedding.tokens, part, model.positions), mask))
        assert_same(model(part, mask)[mask], expected[mask])


@pytest.mark.parametrize("lengths", [[5], [2, 1, 2]])
@torch.no_grad()
def test_encoder_decoder(lengths: list[int]) -> None:
    model = encoder_decoder(attention="gqa", num_groups=2, embedding_norm=True, head_bias=True)
    source, source_mask = ids(2, 4, VOCAB + 2), padding([(0, 4), (1, 2)], 4)
    encoder = StackConversation(model.encoder, [Options(causal=False, cached=False, **GQA)] * 2, "before", "silu")
    encoded = encoder.call(embedded(model.source_embedding.tokens, source, model.source_positions), source_mask)
    decoder = StackConversation(model.decoder, [Options(**GQA)] * 2, "before", "silu")
    tokens, real = ids(2, 5, seed=1), padding([(0, 5), (0, 3)], 5)
    if len(lengths) > 1:
        model.enable_cache()
    for part, mask in zip(tokens.split(lengths, 1), real.split(lengths, 1), strict=True):
        x = embedded(model.target_embedding.tokens, part, model.target_positions)
        states = decoder.call(x, mask, source=encoded, source_mask=source_mask)
        expected = logits_of(model, states)
        assert_same(model(source, part, source_mask, mask)[mask], expected[mask])
