"""Exceptions of the library. Each derives from one base and from the built-in type that a caller would catch.

A message names the argument, the expected value, the value that was given, and a remedy. Exceptions are raised before
any state changes, so the corrected call can be repeated.
"""

import math
from numbers import Real


class AttentionError(Exception):
    """Base of every exception that this library raises on purpose."""


class ConfigurationError(AttentionError, ValueError):
    """A module or position scheme was built with invalid options."""


class ArgumentError(AttentionError, ValueError):
    """Arguments of one call contradict each other, or a value is outside its range."""


class ShapeError(AttentionError, ValueError):
    """A tensor has the wrong rank, width, length, head count or batch size."""


class DtypeError(AttentionError, TypeError):
    """A tensor has another dtype than the module or the cache."""


class DeviceError(AttentionError, RuntimeError, ValueError):
    """A tensor is on another device than the module or the cache."""


class CacheFullError(AttentionError, RuntimeError, ValueError):
    """The call would cache more tokens than ``max_cache_length`` allows."""


class CacheStateError(AttentionError, RuntimeError, ValueError):
    """The state of the cache does not allow this call (another length, a recompute inside backward)."""


class ConcurrentUseError(AttentionError, RuntimeError, ValueError):
    """A module with a cache was called while another call of the same module was running."""


class FileFormatError(AttentionError, ValueError):
    """A file has another format or version than expected, or was changed after it was written."""


class ForeignFileError(AttentionError, FileExistsError):
    """A write would replace something that this library did not write."""


class RanksError(AttentionError, RuntimeError):
    """Processes that share a model or a sequence differ in what they were given, or one of them is gone."""


class NonFiniteError(AttentionError, ArithmeticError, ValueError):
    """Logits contain NaN or Inf, so no token can be chosen."""


MAX_SIZE = 2**40
"""Upper limit of a size, a length or a number of heads. PyTorch cannot describe a tensor far above it."""

MAX_LAYERS = 2**16
"""Upper limit of the layers of a model or a cache. The deepest published models have a few hundred."""


def shown(value: object) -> str:
    """The `repr` of a value for an error message, cut to 200 characters."""
    try:
        text = repr(value)
    except ValueError:
        # Python refuses to print ints with more than 4,300 digits.
        return f"a {type(value).__name__} with too many digits to show"
    return text if len(text) <= 200 else f"{text[:200]}..."


def require_count(name: str, value: object, least: int = 1, most: int = MAX_SIZE) -> None:
    """Raises ConfigurationError unless `value` is a whole number from `least` to `most`."""
    if type(value) is not int or value < least:
        raise ConfigurationError(f"{name}: expected a whole number (int) of at least {least}, got {shown(value)}")
    if value > most:
        raise ConfigurationError(f"{name}: expected a whole number of at most {most:,}, got a larger number")


def require_number(
    name: str, value: object, *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf
) -> None:
    """Raises ConfigurationError unless `value` is a finite number within these bounds."""
    number = _as_float(value)
    if math.isfinite(number) and above < number < below and number >= least:
        return
    bounds = [
        f"above {above:g}" if above > -math.inf else "",
        f"of at least {least:g}" if least > -math.inf else "",
        f"below {below:g}" if below < math.inf else "",
    ]
    wanted = " and ".join(filter(None, bounds))
    raise ConfigurationError(f"{name}: expected a finite number {wanted}, got {shown(value)}")


def require_flag(name: str, value: object) -> None:
    """Raises ConfigurationError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}: expected True or False, got {shown(value)}")


def _as_float(value: object) -> float:
    """`value` as a float; NaN if it is not a number, or an int that is too large for a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
