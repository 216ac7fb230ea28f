"""Options by our own names in config.json: values of dataclasses, read by the types of their fields, and written."""

from collections.abc import Callable, Iterable
from dataclasses import Field, fields, replace
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

from ..blocks import ACTIVATIONS
from ..errors import ConfigurationError
from ..positions import DynamicNTKScaling, LongRoPEScaling, RotaryScaling
from ..positions.scaling_kinds import SCALINGS
from .documents import Keys, listed
from .limits import MAX_BUCKETS, MAX_CHECKPOINT_LAYERS, MAX_COUNT, MAX_EXPERTS, MAX_HEAD_DIM, MAX_HEADS

Value = TypeVar("Value")

KIND = "kind"
"""Key of a scaling's word in its object."""

_MOST = {
    "num_heads": MAX_HEADS,
    "num_groups": MAX_HEADS,
    "head_dim": MAX_HEAD_DIM,
    "rotary_dim": MAX_HEAD_DIM,
    "num_layers": MAX_CHECKPOINT_LAYERS,
    "num_decoder_layers": MAX_CHECKPOINT_LAYERS,
    "relative_buckets": MAX_BUCKETS,
    "num_experts": MAX_EXPERTS,
    "experts_per_token": MAX_EXPERTS,
}
"""Upper limits of whole numbers other than MAX_COUNT."""


def written(value: object) -> Any:
    """The value of an option as JSON. Raises ConfigurationError for a scaling that is not of this library."""
    if isinstance(value, RotaryScaling):
        kind = next((word for word, scaling in SCALINGS.items() if type(value) is scaling), None)
        if kind is None:
            raise ConfigurationError(
                f"rotary_scaling: expected one of {[each.__name__ for each in SCALINGS.values()]}, got {value}"
            )
        return {KIND: kind} | fields_of(value)
    return list(value) if isinstance(value, tuple) else value


def fields_of(value: Any, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The fields of a dataclass as JSON, by name; all of them unless `names` are given."""
    chosen = [each.name for each in fields(value)] if names is None else names
    return {name: written(getattr(value, name)) for name in chosen}


def read_fields(keys: Keys, kind: type[Any], *, optional: Iterable[str] = (), others: Iterable[str] = ()) -> Any:
    """A value of the dataclass `kind`, from the keys of an object: each field by its name.

    `optional`: fields that the object may lack, which then have their defaults. `others`: further keys of the object.

    Raises ConfigurationError, with the key and the file, for a missing, unknown or invalid key.
    """
    known = {each.name: each for each in fields(kind)}
    check_known(keys, [*known, *others])
    if lacking := [name for name in known if name not in {*keys.given, *optional}]:
        raise keys.refusal(lacking[0], "a value, as every option is given here")
    values = {name: read_field(keys, known[name]) for name in keys.given if name in known}
    return named(keys, lambda: kind(**values))


def check_known(keys: Keys, known: Iterable[str]) -> None:
    """Raises ConfigurationError, with the key and the file, for a key that is not one of these."""
    names = list(known)
    if unknown := [name for name in keys.given if name not in names]:
        raise keys.refusal(unknown[0], f"no such key; this object may have {listed(names)}")


def named(keys: Keys, build: Callable[[], Value]) -> Value:
    """The result of `build`. Raises its ConfigurationError with the file."""
    try:
        return build()
    except ConfigurationError as error:
        raise ConfigurationError(f"{keys.file}, {keys.within}{error}") from error


def read_field(keys: Keys, option: Field[Any], key: str | None = None) -> Any:
    """The value of an option at a key, its own name by default, by the type of its field.

    Raises ConfigurationError, with the key and the file.
    """
    name, kind = key or option.name, option.type
    if isinstance(kind, UnionType) or get_origin(kind) not in (None, Literal, tuple):
        if name not in keys:
            return None
        kind = next(each for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is Literal:
        return keys.word(name, {word: word for word in get_args(kind)})
    if option.name == "activation":
        return keys.word(name, {word: word for word in ACTIVATIONS})
    if kind is bool:
        return keys.flag(name)
    if kind is int:
        return keys.whole(name, least=0, most=_MOST.get(option.name, MAX_COUNT))
    if kind is float:
        return keys.number(name, zero=True)
    if get_origin(kind) is tuple:
        if str in get_args(kind):
            return tuple(keys.names(name))
        return tuple(keys.wholes(name) if int in get_args(kind) else keys.numbers(name))
    if kind is RotaryScaling:
        inner = keys.inner(name)
        scaling = read_fields(inner, inner.word(KIND, SCALINGS), others=(KIND,))
        depends = keys.length is not None and isinstance(scaling, DynamicNTKScaling | LongRoPEScaling)
        return replace(scaling, length=keys.length) if depends else scaling
    return keys.text(name)
