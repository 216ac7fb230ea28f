"""Compositions for tests: options and mixtures of layers, chosen by a seed."""

from __future__ import annotations

from random import Random

from transformer.models import Composition, DecoderOnlyConfig, LayerParts, NormConfig
from transformer.models.layers import Dropouts
from transformer.positions import DynamicNTKScaling, LinearScaling, Llama3Scaling, LongRoPEScaling, YaRNScaling

VOCAB, WIDTH = 11, 16
SCALINGS = (
    None,
    LinearScaling(2.0),
    Llama3Scaling(8.0, 1.0, 4.0, 16),
    YaRNScaling(2.0, 16),
    DynamicNTKScaling(2.0, 16, 64),
    LongRoPEScaling((1.0, 2.0), (2.0, 3.0), 16, 64),
)


def layer_options(random: Random) -> dict[str, object]:
    """Options of a layer, spelled out or left to their defaults."""
    one_of = random.choice
    kind = one_of(["mha", "mqa", "gqa"])
    position = one_of(["rotary", "rotary", "alibi", "relative", "none"])
    window = one_of([None, 2, 3])
    rotary_dim = one_of([None, 2, 4])
    options = {
        "num_heads": 4,
        "d_ff": one_of([12, 20]),
        "attention": kind,
        "num_groups": one_of([1, 2, 4]) if kind == "gqa" else None,
        "head_dim": one_of([None, 4, 6]),
        "attention_bias": one_of([True, False]),
        "out_bias": one_of([None, True, False]),
        "qk_norm": one_of([True, False]),
        "qk_norm_per_head": one_of([True, True, False]),
        "scale": one_of([None, 0.5, 4**-0.5]),
        "softcap": one_of([None, 5.0]),
        "window_size": window,
        "num_sinks": 0 if window is None else one_of([0, 1]),
        "position": position,
        "rotary_base": one_of([10000.0, 500.0]),
        "rotary_dim": rotary_dim,
        "rotary_interleaved": one_of([True, False]),
        "rotary_scaling": one_of(SCALINGS[:5] if rotary_dim != 4 else SCALINGS) if rotary_dim != 2 else None,
        "relative_buckets": one_of([8, 32]),
        "relative_max_distance": one_of([40, 128]),
        "relative_per_layer": one_of([True, False]),
        "norm": one_of(["rms", "layer"]),
        "norm_eps": one_of([1e-5, 1e-6]),
        "norm_bias": one_of([True, False]),
        "norm_unit_offset": one_of([True, False]),
        "norm_placement": one_of(["before", "after", "both", "branch"]),
        "feed_forward": one_of(["plain", "gated"]),
        "activation": one_of(["relu", "gelu", "gelu_tanh", "silu"]),
        "feed_forward_bias": one_of([True, False]),
        "dropout": one_of([0.0, 0.25]),
        "residual_scale": one_of([1.0, 0.5]),
    }
    if options["norm_placement"] == "before":
        options["residual"] = one_of(["sequential", "parallel", "parallel_one_norm"])
    return options


def model_options(random: Random, layers: int) -> DecoderOnlyConfig:
    """Options of a whole model, with windows in a pattern, and with positions added to embeddings now and then."""
    one_of = random.choice
    options = layer_options(random)
    sines = {"position": "sinusoidal", "sinusoidal_interleaved": one_of([True, False])}
    added = one_of([{}, {}, sines, {"position": "learned", "max_length": 24, "position_offset": 2}])
    if options["window_size"] is not None and layers > 1:
        options["layer_pattern"] = one_of([None, "sliding full", "full sliding", "sliding"])
    if not added and options["position"] != "none" and layers > 1:
        options["position_pattern"] = one_of([None, f"none {options['position']}", "none"])
    if not added and options["position"] == "rotary" and options["window_size"] is not None:
        options["rotary_sliding_base"] = one_of([None, 9.0])
    return DecoderOnlyConfig(
        VOCAB,
        WIDTH,
        num_layers=layers,
        tied_embeddings=one_of([True, False]),
        embedding_scale=one_of([1.0, 4.0]),
        embedding_norm=one_of([True, False]),
        logit_scale=one_of([1.0, 0.5]),
        head_bias=one_of([True, False]),
        logit_softcap=one_of([None, 5.0]),
        has_head=one_of([True, True, True, False]),
        stop_tokens=one_of([(), (2,)]),
        pad_token=one_of([None, 0]),
        start_token=one_of([None, 1]),
        context_length=one_of([None, 64]),
        **options | added,
    )


def composition(seed: int) -> Composition:
    """By options, or layers that differ in everything; the same seed gives the same."""
    random = Random(seed)
    count = random.choice([1, 2, 3])
    config = model_options(random, count)
    if random.random() < 0.4:
        return Composition(config)
    layers = []
    for _ in range(count):
        options = layer_options(random) | {"relative_per_layer": True}
        norm = random.choice([None, NormConfig(norm="layer", norm_bias=False), NormConfig(norm_eps=1e-3)])
        dropouts = random.choice([None, Dropouts(0.5, 0.25, 0.25), Dropouts(0.5, 0.5, 0.5)])
        layers.append(LayerParts(DecoderOnlyConfig(VOCAB, WIDTH, num_layers=1, **options), norm, dropouts))
    last_norm = random.choice([None, NormConfig(norm="layer"), NormConfig()])
    return Composition(config, tuple(layers), last_norm)
