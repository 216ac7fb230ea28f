"""Scalings of rotary embeddings in config.json: one reader for each word of `rope_type`, and what is written."""

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigurationError
from ..positions import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    RotaryScaling,
    YaRNScaling,
)
from .documents import Keys
from .limits import MAX_COUNT

LENGTH, ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"

Reader = Callable[[Keys, Keys, int | None], RotaryScaling | None]
"""Reader of a scaling, from its object, the file, and the default of `max_position_embeddings`."""


def plain(_rope: Keys, _keys: Keys, _longest: int | None) -> RotaryScaling | None:
    """No scaling."""
    return None


def _linear(rope: Keys, _keys: Keys, _longest: int | None) -> RotaryScaling:
    return LinearScaling(rope.number("factor"))


def _dynamic(rope: Keys, keys: Keys, default_length: int | None) -> RotaryScaling:
    original = keys.whole(LENGTH, default_length)
    return DynamicNTKScaling(rope.number("factor"), original, keys.length or original)


def _llama3(rope: Keys, keys: Keys, default_length: int | None) -> RotaryScaling:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    return Llama3Scaling(rope.number("factor"), low, high, _original(rope, keys, default_length))


def _yarn(rope: Keys, keys: Keys, default_length: int | None) -> RotaryScaling:
    optional = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    # A zero means that the key is not given. Beside an attention_factor transformers does not read the last two.
    unread = optional[2:] if "attention_factor" in rope else ()
    given = {
        name: rope.number(name, text=name in unread)
        for name in optional
        if not rope.is_value(name, 0) and not rope.is_value(name, 0.0)
    }
    if "attention_factor" in rope:
        given["attention_factor"] = rope.number("attention_factor")
    # Null means false, as in transformers.
    truncate = rope.flag("truncate", rope.missing("truncate", True) is not None)
    return YaRNScaling(
        _factor(rope, keys, default_length), _original(rope, keys, default_length), truncate=truncate, **given
    )


def longrope(rope: Keys, keys: Keys, default_length: int | None) -> RotaryScaling:
    """LongRoPE, with the long factors where the caller's length is above the pretraining length."""
    original = _original(rope, keys, default_length)
    attention_factor = rope.number("attention_factor") if "attention_factor" in rope else None
    return LongRoPEScaling(
        rope.numbers("short_factor"),
        rope.numbers("long_factor"),
        original,
        keys.length or original,
        factor=_factor(rope, keys, default_length),
        attention_factor=attention_factor,
    )


READERS: Mapping[str, Reader] = {
    "default": plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": longrope,
}
"""Words of scalings, each with what reads it."""


def _original(rope: Keys, keys: Keys, default_length: int | None) -> int:
    """The pretraining length: of config.json if it has the key, else of the scaling."""
    source = keys if ORIGINAL in keys else rope
    if ORIGINAL not in source:
        return keys.whole(LENGTH, default_length)
    # Some files have 8192.0, which transformers accepts.
    length = source.number(ORIGINAL)
    return int(length) if length.is_integer() and length <= MAX_COUNT else source.whole(ORIGINAL)


def _factor(rope: Keys, keys: Keys, default_length: int | None) -> float:
    if "factor" in rope:
        return rope.number("factor")
    return keys.whole(LENGTH, default_length) / _original(rope, keys, default_length)


def scaled_length(scaling: RotaryScaling | None) -> int | None:
    """The length that a scaling by a factor of lengths is for; readers warn of another one."""
    if not isinstance(scaling, YaRNScaling | LongRoPEScaling):
        return None
    return max(round(scaling.factor * scaling.original_length), 1)


def written_scaling(scaling: RotaryScaling) -> dict[str, Any]:
    """The object of a scaling. Raises ConfigurationError for one that config.json cannot express."""
    match scaling:
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case DynamicNTKScaling():
            return {"rope_type": "dynamic", "factor": scaling.factor}
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                ORIGINAL: scaling.original_length,
            }
        case YaRNScaling():
            optional = {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": scaling.attention_factor,
                "truncate": scaling.truncate,
                ORIGINAL: scaling.original_length,
            } | {key: value for key, value in optional.items() if value is not None}
        case LongRoPEScaling():
            return {
                "rope_type": "longrope",
                "factor": scaling.factor,
                "attention_factor": scaling.attention_factor,
                "short_factor": list(scaling.short_factor),
                "long_factor": list(scaling.long_factor),
                ORIGINAL: scaling.original_length,
            }
    raise ConfigurationError(f"rotary_scaling: expected a scaling that config.json can express, got {scaling}")
