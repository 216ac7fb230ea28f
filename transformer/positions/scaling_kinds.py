"""Kinds of rotary scalings: every class of this package, by its word in config.json."""

from collections.abc import Mapping

from .longrope import LongRoPEScaling
from .scaling import DynamicNTKScaling, LinearScaling, Llama3Scaling, RotaryScaling
from .yarn import YaRNScaling

SCALINGS: Mapping[str, type[RotaryScaling]] = {
    "linear": LinearScaling,
    "dynamic": DynamicNTKScaling,
    "llama3": Llama3Scaling,
    "yarn": YaRNScaling,
    "longrope": LongRoPEScaling,
}
