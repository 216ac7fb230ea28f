"""Normal form of a layer and its options: one spelling for all options that build the same modules."""

from dataclasses import fields, replace
from typing import Any, NamedTuple

from .config import DecoderOnlyConfig, DecoderOnlyOptions
from .layers import Dropouts
from .parts import NormConfig

ADDED = ("learned", "sinusoidal")
"""Positions that are added to embeddings, so that layers do not have them."""

NOT_ADDED: dict[str, Any] = {"max_length": None, "position_offset": 0, "sinusoidal_interleaved": True}
"""Options of added positions in a model without them."""

_DEFAULTS = {each.name: each.default for each in fields(DecoderOnlyConfig)}

PATTERNS = ("layer_pattern", "position_pattern", "rotary_sliding_base")
"""Options that say how layers of one model differ; the options of a layer have None."""

OF_MODEL = (
    *(each.name for each in fields(DecoderOnlyOptions)),
    "embedding_scale",
    "embedding_norm",
    "head_bias",
    "logit_scale",
    "logit_softcap",
)
"""Options that are not of a layer."""


class LayerParts(NamedTuple):
    """One layer: the options of a model of this layer alone, and the norm of its queries and keys."""

    options: DecoderOnlyConfig
    """With `num_layers=1` and None in `PATTERNS`; what is not of a layer is as in the model's own options."""
    qk_norm: NormConfig | None
    """None: no norm. By options alone it is the norm of the blocks."""
    dropouts: Dropouts | None = None
    """Those of the block, where they differ; None: each is `options.dropout`."""

    @property
    def each_dropout(self) -> Dropouts:
        """Dropout of attention weights, of branches and of the hidden layer."""
        return self.dropouts or Dropouts(*[self.options.dropout] * 3)


def normal_options(options: DecoderOnlyConfig) -> DecoderOnlyConfig:
    """The same options with their defaults where they are spelled out, and where no module reads them."""
    heads, groups = options.num_heads, options.kv_heads
    head_dim = options.head_dim or options.d_model // heads
    # Kinds of attention are names of numbers of key/value heads.
    kind = "mha" if groups == heads else "mqa" if groups == 1 else "gqa"
    changes: dict[str, Any] = {
        "attention": kind,
        "num_groups": groups if kind == "gqa" else None,
        "head_dim": None if head_dim * heads == options.d_model else head_dim,
    }
    if options.out_bias == options.attention_bias:
        changes["out_bias"] = None
    if options.scale == head_dim**-0.5:
        changes["scale"] = None
    if options.rotary_dim == head_dim:
        changes["rotary_dim"] = None
    if options.norm == "rms":
        changes["norm_bias"] = True
    if options.feed_forward != "mixture":
        changes["normalize_routing_weights"] = True
    for position in ("rotary", "relative", "sinusoidal"):
        if options.position != position:
            changes |= {name: default for name, default in _DEFAULTS.items() if name.startswith(f"{position}_")}
    if not options.has_head:
        changes |= {name: _DEFAULTS[name] for name in ("tied_embeddings", "head_bias", "logit_scale", "logit_softcap")}
    return replace(options, **changes)


def normal_norm(norm: NormConfig) -> NormConfig:
    """A norm by itself: without its placement."""
    return NormConfig(
        norm=norm.norm,
        norm_eps=norm.norm_eps,
        norm_bias=norm.norm_bias or norm.norm == "rms",
        norm_unit_offset=norm.norm_unit_offset,
    )


def normal_layer(layer: LayerParts, config: DecoderOnlyConfig, *, one_bias: bool) -> LayerParts:
    """The same layer in normal form, in a model of these options, where at most one layer has a relative bias."""
    options, dropouts = layer.options, layer.dropouts
    changes: dict[str, Any] = {name: getattr(config, name) for name in OF_MODEL} | {
        "qk_norm": layer.qk_norm is not None
    }
    if options.position in (*ADDED, "none"):
        added = config.position in ADDED
        changes |= {
            "position": config.position if added else "none",
            **({name: getattr(config, name) for name in NOT_ADDED} if added else NOT_ADDED),
        }
    if layer.qk_norm is None:
        changes["qk_norm_per_head"] = True
    if dropouts is not None:
        changes["dropout"] = dropouts.branches
        dropouts = None if len(set(dropouts)) == 1 else dropouts
    if one_bias:
        changes["relative_per_layer"] = False
    qk_norm = None if layer.qk_norm is None else normal_norm(layer.qk_norm)
    return LayerParts(normal_options(replace(options, **changes)), qk_norm, dropouts)
