"""Whole encoder-decoders: sources that change, decoders deeper than their encoders, and biases of new rows alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conversations import assert_same
from tests.models.t5_family import Pair, ids, pair
from tests.setups import padding
from transformer.models import UMT5Model, init_cache


@torch.no_grad()
def test_a_changed_encoder_output_is_noticed() -> None:
    """Issues: transformers UMT5 (reproduced, with bit-identical answers). A changed encoder output kept
    being answered from the old one, also where it changes in place or with its mask."""
    model = pair("umt5").ours.double()
    states, mask = model.encoder(ids(2, 9)), padding([(0, 9), (0, 9)], 9)
    target = ids(2, 6, seed=1)
    cache = init_cache(model.config, 2, 12, 9, torch.float64)
    for index, column in enumerate(target.split(1, 1)):
        if index == 1:
            states[:, 4] += 1.0
        elif index == 2:
            states = model.encoder(ids(2, 9, seed=7))
        elif index == 3:
            mask = padding([(0, 9), (2, 7)], 9)
        model.decoder(column, states, mask, cache=cache, use_cache=True)
        kept = [layer["key"].clone() for layer in cache.cross_attention]
        fresh = init_cache(model.config, 2, 12, 9, torch.float64)
        model.decoder(column, states, mask, cache=fresh, use_cache=True)
        for key, layer in zip(kept, fresh.cross_attention, strict=True):
            assert torch.equal(key, layer["key"])
    answers = [model.generate(ids(2, 9, seed=seed), max_new_tokens=8).tolist() for seed in (0, 7, 0)]
    assert answers[0] == answers[2] != answers[1]


@pytest.mark.parametrize(("encoders", "decoders"), [(1, 4), (4, 1)])
@torch.no_grad()
def test_more_decoder_than_encoder_layers(encoders: int, decoders: int) -> None:
    """Issues: transformers 5.23 (reproduced). UMT5 with more decoder than encoder layers crashed as soon as its cache
    was used. The cache has the decoder's layers, whatever the encoder has."""
    model = pair("umt5", encoders=encoders, decoders=decoders).ours.double()
    states, target = model.encoder(ids(2, 9)), ids(2, 6, seed=1)
    cache = init_cache(model.config, 2, 6, 9, torch.float64)
    assert len(cache.self_attention) == len(cache.cross_attention) == decoders
    parts = [model.decoder(column, states, cache=cache, use_cache=True) for column in target.split(1, 1)]
    assert_same(torch.cat(parts, 1), model.decoder(target, states))
    written = [model.generate(ids(2, 9), max_new_tokens=8, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*written)


def biases(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of all distances that any decoder layer's bias is asked for, from now on."""
    asked: list[tuple[int, ...]] = []
    model = pair.ours.transformer if isinstance(pair.ours, UMT5Model) else pair.ours
    for scheme in {id(block.attention.position): block.attention.position for block in model.decoder_blocks()}.values():
        honest = scheme.bias

        def bias(distance: Tensor, honest=honest) -> Tensor:
            asked.append(tuple(distance.shape))
            return honest(distance)

        monkeypatch.setattr(scheme, "bias", bias)
    return asked


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("family", "schemes"), [("t5", 1), ("t5 1.1", 1), ("umt5", 3)])
def test_a_step_asks_each_bias_once_for_its_new_row(
    family: str, schemes: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issues: transformers#26144. UMT5 recomputed each layer's bias over the whole history at every step. A bias that
    layers share is worked out once in a step, not once in each layer; one row of it, as long as the history."""
    both = pair(family)
    asked = biases(both, monkeypatch)
    mask = padding([(0, 9), (3, 6)], 9) if padded else None
    both.ours.generate(ids(2, 9), mask, max_new_tokens=6)
    assert asked == [shape for step in range(1, 7) for shape in [(1, step)] * schemes]
