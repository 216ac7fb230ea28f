"""Checks of the options that an attention module is built with."""

from typing import cast

from ..codecs import CacheDtypes, codec_names
from ..errors import ArgumentError, ConfigurationError, require_count, require_flag, require_number, shown
from ..positions import Rotation, ScoreBias


def check_heads(embed_dim: int, num_heads: int, num_groups: int, head_dim: int | None) -> None:
    """Raises ConfigurationError where heads do not divide what they share."""
    for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads), ("num_groups", num_groups)):
        require_count(name, value)
    if head_dim is not None:
        require_count("head_dim", head_dim)
    if num_heads % num_groups:
        raise ConfigurationError(f"num_groups: expected a divisor of num_heads={num_heads}, got {num_groups}")
    if head_dim is None and embed_dim % num_heads:
        raise ConfigurationError(
            f"embed_dim: expected a multiple of num_heads={num_heads}, got {embed_dim}; or give head_dim"
        )


def key_value_heads(num_groups: int | None, num_kv_heads: int | None) -> int:
    """The number of key/value heads, given by either of its names. Raises ConfigurationError unless by exactly one."""
    if num_groups is not None and num_kv_heads is not None:
        raise ConfigurationError(
            "num_groups, num_kv_heads: expected exactly one of the two, which are names of one option, "
            f"got num_groups={shown(num_groups)} and num_kv_heads={shown(num_kv_heads)}"
        )
    if num_groups is None and num_kv_heads is None:
        raise ConfigurationError(
            "num_groups: expected a whole number of at least 1, got None; give it by this name or as num_kv_heads"
        )
    name, number = ("num_groups", num_groups) if num_kv_heads is None else ("num_kv_heads", num_kv_heads)
    require_count(name, number)
    return cast(int, number)


def check_flags(**flags: object) -> None:
    """Raises ConfigurationError unless each is True or False."""
    for name, flag in flags.items():
        require_flag(name, flag)


def check_memory(window_size: int | None, num_sinks: int, max_cache_length: int | None) -> None:
    """Raises ConfigurationError for a window, sinks and a limit that do not go together."""
    for name, length in (("window_size", window_size), ("max_cache_length", max_cache_length)):
        if length is not None:
            require_count(name, length)
    require_count("num_sinks", num_sinks, least=0)
    if num_sinks and window_size is None:
        raise ConfigurationError(f"num_sinks: expected 0 without a window_size, got {num_sinks}; give window_size too")
    if max_cache_length is not None and window_size is not None and max_cache_length < window_size + num_sinks:
        raise ConfigurationError(
            f"max_cache_length: expected at least window_size + num_sinks = {window_size + num_sinks}, "
            f"got {max_cache_length}"
        )


def check_cache_dtype(cache_dtype: CacheDtypes) -> None:
    """Raises ConfigurationError for a storage of the cache that there is not."""
    try:
        codec_names(cache_dtype)
    except ArgumentError as error:
        raise ConfigurationError(str(error)) from None


def check_numbers(dropout: float, scale: float | None, softcap: float | None) -> None:
    """Raises ConfigurationError for numbers that would make every output wrong."""
    require_number("dropout", dropout, least=0.0, below=1.0)
    for name, factor in (("scale", scale), ("softcap", softcap)):
        if factor is not None:
            # In float32, in which kernels multiply, it is neither 0 nor infinite: 0 times a hidden score is NaN.
            require_number(name, factor, above=2.0**-150, below=(2.0 - 2.0**-24) * 2.0**127)


def check_rules(**rules: object) -> None:
    """Raises ConfigurationError for a rule that is no function of positions."""
    for name, rule in rules.items():
        if rule is not None and (not callable(rule) or isinstance(rule, type)):
            raise ConfigurationError(f"{name}: expected None, a function or a module of positions, got {shown(rule)}")


def check_position(position: object, num_heads: int, head_dim: int) -> None:
    """Raises ConfigurationError where a position scheme does not fit the heads."""
    if position is None:
        return
    if isinstance(position, Rotation):
        if position.head_dim != head_dim:
            raise ConfigurationError(f"position: expected head_dim={head_dim}, got {position.head_dim}")
    elif isinstance(position, ScoreBias):
        if position.num_heads != num_heads:
            raise ConfigurationError(f"position: expected num_heads={num_heads}, got {position.num_heads}")
    else:
        raise ConfigurationError(
            f"position: expected a Rotation or a ScoreBias of transformer.positions, got {type(position).__name__}"
        )
