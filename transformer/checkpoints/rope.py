"""Rotary embeddings in config.json: `rope_parameters`, and `rope_theta` and `rope_scaling` of older files."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from .entries import Entry, Options
from .limits import MAX_COUNT
from .windows import LAYER_TYPES

BASE = 10000.0
PART, LENGTH, CONTEXT = "partial_rotary_factor", "max_position_embeddings", "context_length"

UNSTATED_LENGTH = 32_768
"""`max_position_embeddings` of a model without a context length, in tokens. Without the key readers fall back to 2,048.
Engines take it as the longest sequence and reserve for one of that length: 4 GiB of keys and values of an 8B model (32
layers, 8 groups of 128, bfloat16), which fits beside its weights on a 24 GiB card."""


@dataclass(frozen=True)
class Rope(Entry):
    """Base and scaling of rotary embeddings, and the length of the model.

    Scalings that depend on a length use the caller's `length`, or else the pretraining length, at which they change
    little or nothing. `default_length` is the default of `max_position_embeddings` for scalings.

    `max_position_embeddings` is always written. Where it is not the model's context length, a key `context_length` has
    that: a number, or null for a model without one.

    `part`: the share of each head that is rotated where no key says it; None: whole heads, in all models of the family.
    `base_key` and `part_key` are the keys beside `rope_parameters` in its older files.
    """

    default_length: int
    part: float | None = None
    base_key: str = "rope_theta"
    part_key: str = PART

    def read(self, keys: Keys) -> Options:
        # As in transformers: `rope_scaling` unless it is empty, and keys inside of it before keys of config.json.
        rope = keys.inner("rope_parameters" if keys.is_empty("rope_scaling") else "rope_scaling")
        rope = rope.inner_of_all(LAYER_TYPES)
        kind = rope.word("rope_type" if "rope_type" in rope else "type", _READERS, "default")
        base = rope.number("rope_theta") if "rope_theta" in rope else keys.number(self.base_key, BASE)
        length = keys.whole(LENGTH) if LENGTH in keys else None
        if CONTEXT in keys.given:
            length = keys.whole(CONTEXT) if CONTEXT in keys else None
        found, key = (rope, PART) if PART in rope else (keys, self.part_key)
        # Where transformers does not read it, it takes a text as well.
        part = found.number(key, self.part or 1.0, text=self.part is None)
        if part != 1.0 and self.part is None:
            raise found.refusal(key, "1, as only a rotation of the whole head is supported")
        try:
            scaling = kind(rope, keys, keys.missing(LENGTH, self.default_length))
        except ConfigurationError as error:
            text = str(error)
            raise error if text.startswith(str(keys.file)) else ConfigurationError(f"{keys.file}, {text}") from error
        options = {"rotary_base": base, "rotary_scaling": scaling, "context_length": length}
        return options if self.part is None else options | {"rotary_dim": int(_head_dim(keys) * part)}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        scaling, context = options["rotary_scaling"], options["context_length"]
        rope: dict[str, Any] = {"rope_type": "default"} if scaling is None else _rope_parameters(scaling)
        rope["rope_theta"] = options["rotary_base"]
        if self.part is not None:
            rope[PART] = _share(
                options["rotary_dim"], options["head_dim"] or options["d_model"] // options["num_heads"]
            )
        length = context or _scaled_length(scaling) or UNSTATED_LENGTH
        if isinstance(scaling, DynamicNTKScaling):
            length = scaling.original_length
        document = {"rope_parameters": rope, LENGTH: length}
        return document if length == context else document | {CONTEXT: context}

    @property
    def keys(self) -> Mapping[str, str]:
        rotary_dim = "head_dim" if self.part is None else self.part_key
        return {"rotary_base": self.base_key, "rotary_dim": rotary_dim, "context_length": LENGTH}


def _head_dim(keys: Keys) -> int:
    return keys.whole("head_dim", keys.whole("hidden_size") // keys.whole("num_attention_heads"))


def _share(rotary_dim: int | None, head_dim: int) -> float:
    """The share of a head that is rotated, which times `head_dim`, and cut to a whole number, is `rotary_dim` again."""
    share = 1.0 if rotary_dim is None else rotary_dim / head_dim
    return share if rotary_dim in (None, int(head_dim * share)) else math.nextafter(share, 1.0)


def _plain(_rope: Keys, _keys: Keys, _longest: int | None) -> RotaryScaling | None:
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


def _longrope(rope: Keys, keys: Keys, default_length: int | None) -> RotaryScaling:
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


_READERS: dict[str, Callable[[Keys, Keys, int | None], RotaryScaling | None]] = {
    "default": _plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _original(rope: Keys, keys: Keys, default_length: int | None) -> int:
    """The pretraining length: of config.json if it has the key, else of the scaling."""
    key = "original_max_position_embeddings"
    source = keys if key in keys else rope
    if key not in source:
        return keys.whole(LENGTH, default_length)
    # Some files have 8192.0, which transformers accepts.
    length = source.number(key)
    return int(length) if length.is_integer() and length <= MAX_COUNT else source.whole(key)


def _factor(rope: Keys, keys: Keys, default_length: int | None) -> float:
    if "factor" in rope:
        return rope.number("factor")
    return keys.whole(LENGTH, default_length) / _original(rope, keys, default_length)


def _scaled_length(scaling: RotaryScaling | None) -> int | None:
    """The length that a scaling by a factor of lengths is for; readers warn of another one."""
    if not isinstance(scaling, YaRNScaling | LongRoPEScaling):
        return None
    return max(round(scaling.factor * scaling.original_length), 1)


def _rope_parameters(scaling: RotaryScaling) -> dict[str, Any]:
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
                "original_max_position_embeddings": scaling.original_length,
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
                "original_max_position_embeddings": scaling.original_length,
            } | {key: value for key, value in optional.items() if value is not None}
        case LongRoPEScaling():
            return {
                "rope_type": "longrope",
                "factor": scaling.factor,
                "attention_factor": scaling.attention_factor,
                "short_factor": list(scaling.short_factor),
                "long_factor": list(scaling.long_factor),
                "original_max_position_embeddings": scaling.original_length,
            }
    raise ConfigurationError(f"rotary_scaling: expected a scaling that config.json can express, got {scaling}")
