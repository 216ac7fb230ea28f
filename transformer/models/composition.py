"""Composition of a decoder-only model: its options, and where its layers differ from them, read from its modules."""

from dataclasses import dataclass
from typing import NamedTuple

from .config import DecoderOnlyConfig
from .parts import NormConfig


class LayerParts(NamedTuple):
    """One layer: the options of a model of this layer alone, and the norm of its queries and keys."""

    options: DecoderOnlyConfig
    """With `num_layers=1` and no `layer_pattern`; what is not of a layer is as in the model's own options."""
    qk_norm: NormConfig | None
    """None: no norm. By options alone it is the norm of the blocks."""


@dataclass(frozen=True)
class Composition:
    """A decoder-only model as data: `config` says it all where `layers` is empty, else what is not of a layer."""

    config: DecoderOnlyConfig
    layers: tuple[LayerParts, ...] = ()
    last_norm: NormConfig | None = None
    """The norm after the last block; read only where `layers` are given."""
    head_bias: bool = False
    """Whether the head adds a bias, which options cannot say; read only where `layers` are given."""
