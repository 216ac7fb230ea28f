"""Compositions for tests of the formats: one for each option of a decoder-only model, and some whose layers differ."""

from __future__ import annotations

from dataclasses import replace

from transformer.models import Composition, DecoderOnlyConfig, LayerParts
from transformer.models.layers import Dropouts
from transformer.models.parts import NormConfig
from transformer.positions import DynamicNTKScaling, LinearScaling, Llama3Scaling, LongRoPEScaling, YaRNScaling

SIZES = {"vocab_size": 31, "d_model": 16, "num_heads": 4, "d_ff": 12, "num_layers": 3}

LONG = LongRoPEScaling([1.0, 2.0], [3.0, 4.0], 64, 200)

FOR_ENGINES: dict[str, dict[str, object]] = {
    "grouped": {"attention": "gqa", "num_groups": 2, "head_dim": 6, "rotary_interleaved": True},
    "multi-query": {"attention": "mqa", "rotary_dim": 2, "rotary_base": 77.0, "qk_norm": True},
    "window": {"window_size": 3, "feed_forward": "plain"},
    "pattern": {"window_size": 3, "layer_pattern": "sliding full", "norm_unit_offset": True},
    "learned": {"position": "learned", "max_length": 20, "position_offset": 2, "context_length": 7},
    "learned, no context": {"position": "learned", "max_length": 20, "attention": "mqa"},
    "sinusoidal": {"position": "sinusoidal", "context_length": 5, "embedding_norm": True},
    "sinusoidal halves": {"position": "sinusoidal", "sinusoidal_interleaved": False},
    "no positions": {"position": "none", "norm_unit_offset": True},
    "scales": {
        "head_bias": True,
        "scale": 0.3,
        "logit_scale": 0.5,
        "embedding_scale": 2.0,
        "residual_scale": 0.5,
    },
    "caps": {"softcap": 5.0, "logit_softcap": 4.0, "qk_norm": True},
    "norm after": {"norm": "layer", "norm_bias": False, "norm_eps": 0.0, "norm_placement": "after"},
    "norm on both sides": {"norm_placement": "both", "norm_unit_offset": True, "qk_norm": True},
    "norm of the branch": {"norm_placement": "branch", "residual_scale": 0.2},
    "a base of sliding layers": {
        "window_size": 3,
        "layer_pattern": "sliding full",
        "rotary_sliding_base": 9.0,
        "rotary_scaling": LinearScaling(2.0),
    },
    "layers without positions": {"position_pattern": "rotary none", "norm_unit_offset": True},
    "layer norm of queries": {"norm": "layer", "qk_norm": True, "norm_eps": 1e-3},
    "parallel": {"residual": "parallel", "scale": 0.2},
    "parallel, one norm": {"residual": "parallel_one_norm", "norm": "layer", "rotary_interleaved": True},
    "plain": {"feed_forward": "plain", "activation": "gelu_tanh", "feed_forward_bias": True},
    "biases": {"attention_bias": True, "out_bias": False, "feed_forward_bias": True, "scale": 0.2},
    "tokens": {
        "tied_embeddings": False,
        "stop_tokens": (1, 2),
        "pad_token": 3,
        "start_token": 4,
        "norm_unit_offset": True,
    },
    "dropout": {"dropout": 0.2, "norm_unit_offset": True},
    "linear": {"rotary_scaling": LinearScaling(2.0), "norm_unit_offset": True},
    "dynamic": {"rotary_scaling": DynamicNTKScaling(2.0, 64, 256), "context_length": 99, "norm_unit_offset": True},
    "llama3": {"rotary_scaling": Llama3Scaling(2.0, 1.0, 4.0, 64), "norm_unit_offset": True},
    "yarn": {"rotary_scaling": YaRNScaling(2.0, 64, mscale=0.5, truncate=False), "norm_unit_offset": True},
    "longrope": {"rotary_scaling": LONG, "norm_unit_offset": True},
    "longrope, odd": {
        "rotary_scaling": LongRoPEScaling([1.0, 2.0], [3.0, 4.0], 64, 60, factor=0.3),
        "norm_unit_offset": True,
    },
}
"""Options of models that no other family describes."""

NATIVE: dict[str, dict[str, object]] = {
    "alibi": {"position": "alibi"},
    "relative": {"position": "relative", "relative_buckets": 8, "relative_max_distance": 20},
    "relative in each layer": {"position": "relative", "relative_per_layer": True, "scale": 1.0},
    "sinks": {"window_size": 3, "num_sinks": 2, "layer_pattern": "full sliding"},
    "mixture": {
        "feed_forward": "mixture",
        "num_experts": 4,
        "experts_per_token": 2,
        "normalize_routing_weights": False,
        "feed_forward_bias": True,
    },
    "norms of all heads": {"qk_norm": True, "qk_norm_per_head": False, "attention": "gqa", "num_groups": 2},
    "sink logits": {"sink_logits": True},
    "no head": {"has_head": False, "norm_placement": "after"},
    "alibi, scaled": {"position": "alibi", "dropout": 0.1, "stop_tokens": (3,), "rotary_scaling": LONG},
}
"""Options of models that engines cannot run."""


def config_of(options: dict[str, object]) -> DecoderOnlyConfig:
    return DecoderOnlyConfig(**SIZES, **options)


_MODEL = config_of({"window_size": 5, "layer_pattern": "sliding full full", "stop_tokens": (3,), "logit_scale": 2.0})
_FULL = replace(_MODEL, num_layers=1, layer_pattern=None, window_size=None)
_SLIDING = replace(_FULL, window_size=5)
_MULTI_QUERY = replace(_FULL, attention="mqa", num_heads=2, head_dim=8, qk_norm=True)
_UNROTATED = replace(_FULL, position="none", d_ff=30, norm="layer", norm_placement="both", qk_norm=True)
_LAST, _OF_QUERIES = NormConfig(norm="layer", norm_eps=1e-3), NormConfig(norm="layer", norm_bias=False)

LAYERED: dict[str, Composition] = {
    "different": Composition(
        _MODEL,
        (
            LayerParts(_SLIDING, None),
            LayerParts(_MULTI_QUERY, _OF_QUERIES),
            LayerParts(_UNROTATED, _UNROTATED.part(NormConfig)),
        ),
        _LAST,
    ),
    "scalings": Composition(
        _MODEL,
        tuple(LayerParts(replace(_FULL, rotary_scaling=scaling), None) for scaling in (None, LONG, LinearScaling(2.0))),
        _MODEL.part(NormConfig),
    ),
    "dropouts": Composition(
        _MODEL,
        (LayerParts(_FULL, None, Dropouts(0.0, 0.1, 0.2)), LayerParts(_FULL, None), LayerParts(_SLIDING, None)),
        _MODEL.part(NormConfig),
    ),
    "windows": Composition(
        _MODEL,
        tuple(LayerParts(replace(_FULL, window_size=window), None) for window in (2, 7, None)),
        _MODEL.part(NormConfig),
    ),
}
"""Compositions whose layers differ."""
