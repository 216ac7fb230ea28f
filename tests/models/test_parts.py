"""Parts of a configuration: each by itself, put into a whole one, and taken out of it again."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from tests.models.variants import SHAPE, VARIANTS, VOCAB, decoder_only, encoder_decoder, ids
from transformer.errors import ConfigurationError
from transformer.models import (
    AttentionConfig,
    DecoderOnlyConfig,
    DecoderOnlyTransformer,
    EncoderConfig,
    EncoderDecoderConfig,
    FeedForwardConfig,
    LayerOptions,
    NormConfig,
    PositionConfig,
    t5_config,
)
from transformer.models.layers import norm_maker
from transformer.models.options import PARTS

CONFIG = DecoderOnlyConfig(VOCAB, **SHAPE)


def test_no_field_stands_in_two_parts() -> None:
    names = [field.name for part in PARTS for field in fields(part)]
    assert len(names) == len(set(names))
    assert names == [field.name for field in fields(LayerOptions)][: len(names)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_configuration_is_its_shape_and_its_parts(variant: str) -> None:
    for model in (decoder_only(variant), encoder_decoder(variant)):
        parts = [model.config.part(kind) for kind in PARTS]
        assert [type(part) for part in parts] == list(PARTS)
        others = {name: value for name, value in model.config.to_dict().items() if name not in _names(*parts)}
        assert type(model.config)(**others).with_parts(*parts) == model.config


def _names(*parts: AttentionConfig) -> set[str]:
    return {name for part in parts for name in part.to_dict()}


@torch.no_grad()
def test_parts_build_the_model_that_flat_options_build() -> None:
    parts = (
        AttentionConfig(attention="gqa", num_kv_heads=2, window_size=3),
        PositionConfig(position="learned", max_length=9),
        NormConfig(norm="layer", norm_placement="both"),
        FeedForwardConfig(feed_forward="plain", activation="gelu"),
    )
    flat = {name: value for part in parts for name, value in part.to_dict().items()}
    model = DecoderOnlyTransformer(VOCAB, **SHAPE, **flat).eval()
    other = DecoderOnlyTransformer.from_config(CONFIG.with_parts(*parts)).eval()
    assert other.config == model.config
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids(2, 5)), model(ids(2, 5)))


def test_a_part_replaces_all_of_its_options_and_no_others() -> None:
    config = replace(CONFIG, norm="layer", norm_eps=1e-3, activation="gelu")
    changed = config.with_parts(NormConfig(norm_placement="after"))
    assert changed == replace(config, norm="rms", norm_eps=1e-6, norm_placement="after")
    assert config.norm == "layer", "the given one is as it was"


def test_a_part_alone_does_for_what_needs_no_more() -> None:
    part = NormConfig(norm="layer", norm_eps=1e-3)
    for config in (part, CONFIG.with_parts(part)):
        norm = norm_maker(config)(8)
        assert (type(norm).__name__, norm.eps) == ("LayerNorm", 1e-3)


@pytest.mark.parametrize(
    ("part", "name", "options"),
    [
        (AttentionConfig, "num_groups", {"attention": "gqa"}),
        (AttentionConfig, "layer_pattern", {"layer_pattern": "sliding wide"}),
        (AttentionConfig, "num_sinks", {"num_sinks": 2}),
        (AttentionConfig, "qk_norm", {"qk_norm": 1}),
        (PositionConfig, "max_length", {"position": "learned"}),
        (PositionConfig, "rotary_base", {"rotary_base": 0.0}),
        (NormConfig, "norm_placement", {"norm_placement": "between"}),
        (NormConfig, "norm_eps", {"norm_eps": -1.0}),
        (FeedForwardConfig, "activation", {"activation": "tanh"}),
        (FeedForwardConfig, "feed_forward", {"feed_forward": ["gated"]}),
    ],
)
def test_a_part_refuses_what_cannot_work(part: type, name: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{name}"):
        part(**options)


@pytest.mark.parametrize("wrong", [CONFIG, {"norm": "rms"}, NormConfig], ids=["config", "dict", "class"])
def test_only_parts_are_taken_as_parts(wrong: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^parts: expected values of AttentionConfig, .*, got "):
        CONFIG.with_parts(wrong)


def test_a_part_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        NormConfig().norm = "layer"


# --- two names of one option ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig(attention="gqa", num_kv_heads=2),
        DecoderOnlyConfig(VOCAB, **SHAPE, attention="gqa", num_kv_heads=2),
        EncoderConfig(VOCAB, **SHAPE, attention="gqa", num_kv_heads=2),
        EncoderDecoderConfig(VOCAB, VOCAB, **SHAPE, attention="gqa", num_kv_heads=2),
        t5_config(VOCAB, **SHAPE, attention="gqa", num_kv_heads=2),
        DecoderOnlyTransformer(VOCAB, **SHAPE, attention="gqa", num_kv_heads=2).config,
    ],
    ids=lambda config: type(config).__name__,
)
def test_one_name_of_the_key_value_heads_is_stored(config: AttentionConfig) -> None:
    stored = config.to_dict()
    assert stored["num_groups"] == 2
    assert "num_kv_heads" not in stored
    assert type(config)(**stored) == config == replace(config)
    assert hash(type(config)(**stored)) == hash(config)
    assert replace(config, num_groups=1).num_groups == 1


@pytest.mark.parametrize(
    ("kind", "number", "heads"),
    [("mha", None, 4), ("mqa", None, 1), ("gqa", 2, 2)],
)
def test_key_value_heads_of_each_kind(kind: str, number: int | None, heads: int) -> None:
    config = replace(CONFIG, attention=kind, num_groups=number)
    assert config.kv_heads == heads
    assert DecoderOnlyTransformer.from_config(config).decoder.blocks[0].attention.num_kv_heads == heads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "gqa"}, "num_groups, num_kv_heads: expected a number by one of these names"),
        ({"num_kv_heads": 2}, "num_groups, num_kv_heads: expected .* None else, got 2 with 'mha'"),
        ({"attention": "gqa", "num_groups": 2, "num_kv_heads": 2}, "num_groups, num_kv_heads: expected exactly one"),
        ({"attention": "gqa", "num_kv_heads": "2"}, "num_kv_heads: expected a whole number"),
        ({"attention": "gqa", "num_kv_heads": 3}, "num_groups: expected a divisor of 4"),
    ],
)
def test_key_value_heads_that_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{message}"):
        DecoderOnlyTransformer(VOCAB, **SHAPE, **options)
    with pytest.raises(ConfigurationError, match=rf"^{message}"):
        EncoderDecoderConfig(VOCAB, VOCAB, **SHAPE, **options)
