"""Compositions: read from modules and built again, whatever the options and however layers differ."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models.compositions import VOCAB, WIDTH, composition
from tests.models.variants import SHAPE, VARIANTS, decoder_only, ids
from tests.setups import fill
from transformer import MultiHeadAttention
from transformer.attention.conversion import to_gqa
from transformer.blocks import BlockStack, DecoderBlock, EncoderBlock, FeedForward, RMSNorm
from transformer.errors import ConfigurationError
from transformer.models import (
    Composition,
    DecoderOnlyConfig,
    DecoderOnlyTransformer,
    LanguageHead,
    LayerParts,
    TokenEmbedding,
    composed,
    composition_of,
    parameters_by_name,
)
from transformer.positions import LinearScaling, RotaryEmbedding, SinusoidalPositions


@pytest.mark.parametrize("seed", range(60))
@torch.no_grad()
def test_a_composition_comes_back_from_its_model(seed: int) -> None:
    """With the same names, shapes and outputs, also from a copy and from `meta`."""
    given = composition(seed)
    model = composed(given).eval()
    fill(model, seed)
    found = composition_of(copy.deepcopy(model))
    assert found == given == found.expanded() == found.by_options()
    assert hash(found) == hash(given)
    if not given.layers:
        assert found.config == given.config
        assert found.layers == ()
    with torch.device("meta"):
        again = composed(found)
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    again = again.to_empty(device="cpu").eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids(2, 7)), model(ids(2, 7)))
    assert [module.p for module in again.modules() if isinstance(module, nn.Dropout)] == [
        module.p for module in model.modules() if isinstance(module, nn.Dropout)
    ]


def test_the_grid_has_both_kinds_and_no_two_equal() -> None:
    given = [composition(seed) for seed in range(60)]
    assert 15 < sum(bool(each.by_options().layers) for each in given) < 45
    assert len(set(given)) == len(given)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_by_options_gives_its_own_configuration(variant: str) -> None:
    """And the same modules by parts give an equal composition, without the configuration."""
    model = decoder_only(variant, stop_tokens=(3,), context_length=99)
    assert composition_of(model).config is model.config
    parts = DecoderOnlyTransformer.from_parts(model.embedding, model.decoder, model.head, model.positions)
    assert composition_of(parts) != composition_of(model)
    parts.config = replace(parts.config, stop_tokens=(3,), context_length=99)
    assert composition_of(parts) == composition_of(model)
    assert composition_of(parts).layers == ()


def test_modules_that_were_changed() -> None:
    """The modules count, not the configuration; options that still say it all stay options."""
    model = DecoderOnlyTransformer(VOCAB, **{**SHAPE, "num_layers": 4})
    converted = composition_of(to_gqa(model, 2))
    assert not converted.layers
    assert (converted.config.attention, converted.config.num_groups) == ("gqa", 2)
    assert converted == Composition(replace(model.config, attention="gqa", num_groups=2))
    for layer in (0, 2):
        model.decoder.blocks[layer].attention.window_size = 5
    assert composition_of(model) == Composition(replace(model.config, window_size=5, layer_pattern="sliding full"))
    assert composition_of(model).config.layer_pattern == "sliding full"
    model.decoder.blocks[0].attention.window_size = 6
    windows = [layer.options.window_size for layer in composition_of(model).layers]
    assert windows == [6, None, 5, None]


def test_every_difference_makes_another_composition() -> None:
    """Nothing that a layer has is lost where options are compared."""
    model = decoder_only("gqa rotary, window, both", torch.float32, dropout=0.5)
    block = model.decoder.blocks[1]
    changes: list[Callable[[], None]] = [
        lambda: setattr(block.attention, "window_size", 7),
        lambda: setattr(block.attention, "num_sinks", 2),
        lambda: setattr(block.attention, "dropout", 0.25),
        lambda: setattr(block.attention, "kernel", replace(block.attention.kernel, scale=0.75)),
        lambda: setattr(block.attention, "kernel", replace(block.attention.kernel, softcap=3.0)),
        lambda: setattr(block.attention, "position", RotaryEmbedding(4, 77.0)),
        lambda: setattr(block.attention, "position", RotaryEmbedding(4, scaling=LinearScaling(2.0))),
        lambda: setattr(block.attention, "position", None),
        lambda: [setattr(norm, "eps", 0.1) for norm in (block.attention.q_norm, block.attention.k_norm)],
        lambda: setattr(block.feed_forward, "activation", F.relu),
        lambda: setattr(block.feed_forward, "dropout", 0.25),
        lambda: setattr(model.decoder.norm, "eps", 0.1),
        lambda: setattr(model.decoder, "norm", None),
        lambda: setattr(model.positions.dropout, "p", 0.25),
        lambda: setattr(model.positions, "positions", SinusoidalPositions(WIDTH)),
        lambda: setattr(model.head, "scale", 2.0),
        lambda: setattr(model.head, "softcap", None),
        lambda: setattr(model.head.proj, "weight", nn.Parameter(model.head.proj.weight.detach())),
        lambda: setattr(model.head.proj, "bias", nn.Parameter(torch.zeros(VOCAB))),
    ]
    seen = {composition_of(model)}
    for change in changes:
        change()
        found = composition_of(model)
        assert composition_of(composed(found)) == found
        seen.add(found)
    assert len(seen) == len(changes) + 1


def other_head_norms(model: DecoderOnlyTransformer) -> None:
    for block in model.decoder.blocks:
        block.attention.q_norm.eps = block.attention.k_norm.eps = 0.1


def other_hidden_dropout(model: DecoderOnlyTransformer) -> None:
    for block in model.decoder.blocks:
        block.feed_forward.dropout = 0.25


@pytest.mark.parametrize(
    "change",
    [
        other_head_norms,
        other_hidden_dropout,
        lambda model: setattr(model.decoder.norm, "eps", 0.1),
        lambda model: setattr(model.decoder, "norm", None),
        lambda model: setattr(model.positions.dropout, "p", 0.25),
        lambda model: setattr(model.positions, "positions", SinusoidalPositions(WIDTH)),
    ],
)
def test_equal_layers_that_options_do_not_describe(change: Callable[[DecoderOnlyTransformer], object]) -> None:
    model = decoder_only("gqa rotary, window, both", torch.float32)
    change(model)
    found = composition_of(model)
    first, second = found.layers
    assert first == second
    assert found != Composition(model.config)
    assert composition_of(composed(found)) == found


@torch.no_grad()
def test_modules_of_torch() -> None:
    """Norms, an embedding and a head of PyTorch have the options of ours, and the names of ours when it matters."""
    rotary = RotaryEmbedding(4)
    blocks = [
        kind(
            MultiHeadAttention(WIDTH, 4, True, position=rotary, qk_norm=nn.LayerNorm),
            FeedForward(WIDTH, 20),
            partial(nn.RMSNorm, eps=1e-4),
        )
        for kind in (DecoderBlock, EncoderBlock)
    ]
    stack = BlockStack(blocks, nn.LayerNorm(WIDTH, bias=False))
    model = DecoderOnlyTransformer.from_parts(nn.Embedding(VOCAB, WIDTH), stack, nn.Linear(WIDTH, VOCAB)).eval()
    fill(model, 0)
    found = composition_of(model)
    first, second = found.layers
    assert first == second
    assert (first.options.norm, first.options.norm_eps, first.qk_norm.norm) == ("rms", 1e-4, "layer")
    assert (found.last_norm.norm, found.last_norm.norm_bias, found.config.head_bias) == ("layer", False, True)
    again = composed(found).eval()
    named = parameters_by_name(model)
    assert list(named) == list(again.state_dict())
    assert named["embedding.tokens.weight"] is model.embedding.weight
    assert named["head.proj.bias"] is model.head.bias
    again.load_state_dict(named)
    # In float64: the norms of PyTorch and ours round float32 differently.
    of_both = [copy.deepcopy(each).double()(ids(2, 5)) for each in (again, model)]
    torch.testing.assert_close(*of_both, rtol=0, atol=1e-9)
    assert model.embedding.weight.dtype is torch.float32
    default = DecoderBlock(MultiHeadAttention(WIDTH, 4, True), FeedForward(WIDTH, 20), nn.RMSNorm)
    model.decoder.blocks[0] = default
    assert composition_of(model).layers[0].options.norm_eps == torch.finfo(torch.float32).eps
    with pytest.raises(ConfigurationError, match=r"^model.decoder.blocks.0.attention_residual.norm_before: .*eps"):
        composition_of(model.bfloat16())


def test_layers_that_make_no_model() -> None:
    def layer(**options: object) -> LayerParts:
        return LayerParts(DecoderOnlyConfig(VOCAB, **{**SHAPE, "num_layers": 1, **options}), None)

    config, relative = DecoderOnlyConfig(VOCAB, **SHAPE), {"position": "relative"}
    for message, layers in [
        ("num_layers=1", (layer(num_layers=2),)),
        ("d_model=16", (layer(d_model=8),)),
        ("relative", (layer(**relative), layer(**relative, relative_buckets=8))),
        ("relative", (layer(**relative), layer(**relative, relative_per_layer=True))),
    ]:
        with pytest.raises(ConfigurationError, match=rf"^layers: expected .*{message}"):
            Composition(config, layers)
    assert Composition(config, (layer(**relative), layer(**relative))).by_options().config.position == "relative"


def test_positions_at_both_places() -> None:
    """Learned positions of the input beside rotary positions of some layers."""
    model = decoder_only("mha learned, after")
    model.decoder.blocks[1].attention.position = RotaryEmbedding(4)
    found = composition_of(model)
    assert (found.config.position, found.config.max_length) == ("learned", 24)
    assert [layer.options.position for layer in found.layers] == ["learned", "rotary"]
    assert composed(found).max_positions == 24
    assert composed(found).decoder.blocks[1].attention.position.base == 10000.0


def test_positions_are_shared() -> None:
    """Layers that rotate alike share one table; tied heads and scaled embeddings are those of parts."""
    rotary, embedding = RotaryEmbedding(4), TokenEmbedding(VOCAB, WIDTH, 4.0)
    blocks = [
        DecoderBlock(MultiHeadAttention(WIDTH, 4, True, position=rotary), FeedForward(WIDTH, width), RMSNorm)
        for width in (8, 12)
    ]
    head = LanguageHead(WIDTH, VOCAB, tied=embedding, softcap=3.0)
    model = composed(composition_of(DecoderOnlyTransformer.from_parts(embedding, BlockStack(blocks), head)))
    first, second = model.decoder.blocks
    assert first.attention.position is second.attention.position
    assert (model.embedding.scale, model.head.softcap) == (4.0, 3.0)
    assert model.head.proj.weight is model.embedding.tokens.weight
