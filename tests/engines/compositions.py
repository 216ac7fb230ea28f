"""Compositions that engines run, small, with weights that no norm or bias leaves neutral."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from transformer.models import DecoderOnlyConfig, DecoderOnlyTransformer, NormConfig
from transformer.models.composition import Composition, LayerParts, composed
from transformer.positions import LinearScaling, Llama3Scaling, YaRNScaling

VOCABULARY = 61


def options(**changes: Any) -> dict[str, Any]:
    """Options of a small model."""
    small = {"vocab_size": VOCABULARY, "d_model": 32, "num_heads": 4, "d_ff": 48, "num_layers": 2}
    return small | changes


OPTIONS: dict[str, dict[str, Any]] = {
    "rotary, mha": options(),
    "mqa, untied, biases": options(
        attention="mqa", tied_embeddings=False, attention_bias=True, out_bias=False, feed_forward_bias=True
    ),
    "interleaved, partial, scaled": options(
        rotary_interleaved=True, rotary_dim=4, rotary_scaling=LinearScaling(4.0), rotary_base=500.0
    ),
    "gqa, llama3, qk_norm": options(
        attention="gqa", num_groups=2, qk_norm=True, rotary_scaling=Llama3Scaling(8.0, 1.0, 4.0, 16)
    ),
    "yarn, head_dim, scale": options(rotary_scaling=YaRNScaling(4.0, 16), head_dim=16, scale=0.3),
    "learned, layer norm, plain": options(
        position="learned",
        max_length=64,
        embedding_norm=True,
        norm="layer",
        feed_forward="plain",
        activation="gelu",
        attention_bias=True,
    ),
    "sinusoidal, after": options(
        position="sinusoidal",
        sinusoidal_interleaved=False,
        norm_placement="after",
        norm="layer",
        norm_bias=False,
        activation="relu",
        num_layers=3,
    ),
    "none, windows": options(position="none", window_size=4, layer_pattern="sliding full", num_layers=3),
    "both, offset, caps, windows": options(
        norm_placement="both",
        norm_unit_offset=True,
        activation="gelu_tanh",
        embedding_scale=32**0.5,
        softcap=5.0,
        logit_softcap=3.0,
        logit_scale=0.7,
        window_size=5,
    ),
    "parallel": options(residual="parallel", norm="layer", feed_forward="plain"),
    "parallel, one norm": options(residual="parallel_one_norm", window_size=4),
    "layer norm with an offset": options(norm="layer", norm_unit_offset=True, qk_norm=True),
    "a base of sliding layers, layers without positions": options(
        num_layers=4,
        window_size=3,
        layer_pattern="sliding full",
        rotary_sliding_base=9.0,
        position_pattern="rotary rotary none rotary",
    ),
    "branch, residual scale": options(norm_placement="branch", residual_scale=0.3),
}
"""Models by options: the words of their names say what is special."""


def _mixed() -> Composition:
    """Layers that differ in everything: windows of two sizes and none, heads, rotary bases, norms, networks."""
    config = DecoderOnlyConfig(**options(num_layers=4, tied_embeddings=False, head_bias=True))
    one = replace(config, num_layers=1)
    layer_norm = NormConfig(norm="layer", norm_eps=1e-5)
    layers = (
        LayerParts(replace(one, window_size=3, rotary_base=100.0), None),
        LayerParts(replace(one, attention="gqa", num_groups=2, qk_norm=True, norm_placement="both"), layer_norm),
        LayerParts(
            replace(one, attention="mqa", window_size=7, position="none", feed_forward="plain", activation="relu"), None
        ),
        LayerParts(
            replace(one, window_size=3, head_dim=16, norm_placement="after", d_ff=16, scale=0.5, norm="layer"), None
        ),
    )
    return Composition(config, layers, layer_norm)


def _learned_with_windows() -> Composition:
    config = DecoderOnlyConfig(**options(position="learned", max_length=64))
    one = replace(config, num_layers=1, position="rotary", max_length=None)
    return Composition(
        config, (LayerParts(replace(one, window_size=4), None), LayerParts(replace(one, window_size=9), None)), None
    )


PARTS: dict[str, Callable[[], Composition]] = {
    "parts: everything differs": _mixed,
    "parts: learned and rotary, windows": _learned_with_windows,
}

NAMES = [*OPTIONS, *PARTS]
"""The names of all compositions."""

CAPPED = [name for name in OPTIONS if OPTIONS[name].get("softcap")]
"""Those that SDPA cannot compute."""


def model_of(name: str) -> DecoderOnlyTransformer:
    """A new model in evaluation mode, whose norms and biases are not neutral."""
    composition = Composition(DecoderOnlyConfig(**OPTIONS[name])) if name in OPTIONS else PARTS[name]()
    return unsettled(composed(composition))


def unsettled(model: DecoderOnlyTransformer) -> DecoderOnlyTransformer:
    """The model in evaluation mode, with noise on every weight."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()
