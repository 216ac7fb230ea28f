"""Exceptions of the library: one base, and each also the built-in type that a caller would catch.

Every message names the argument, what was expected, what came and what to do about it. They are raised before anything
changes: the same call, put right, gives what it would have given at first.
"""

import math
from numbers import Real


class AttentionError(Exception):
    """Base of every exception that this library raises on purpose."""


class ConfigurationError(AttentionError, ValueError):
    """A module or position scheme was built with options that cannot work."""


class ArgumentError(AttentionError, ValueError):
    """Arguments of one call that do not go together, or a value outside its range."""


class ShapeError(AttentionError, ValueError):
    """A tensor of the wrong rank, width, length, head count or batch."""


class DtypeError(AttentionError, TypeError):
    """A tensor of a dtype other than the module's, or than the cache's."""


class DeviceError(AttentionError, RuntimeError, ValueError):
    """A tensor on a device other than the module's, or than the cache's."""


class CacheFullError(AttentionError, RuntimeError, ValueError):
    """The call would hold more tokens than ``max_cache_length`` allows."""


class CacheStateError(AttentionError, RuntimeError, ValueError):
    """The cache is not in a state in which this call can be right (another length, a recompute inside backward)."""


class ConcurrentUseError(AttentionError, RuntimeError, ValueError):
    """A module that owns a cache was called while another call of it was still running."""


class FileFormatError(AttentionError, ValueError):
    """A file that is not of the expected format or version, or not as it was written."""


class ForeignFileError(AttentionError, FileExistsError):
    """A file would be written where something stands that this library did not write."""


class NonFiniteError(AttentionError, ArithmeticError, ValueError):
    """Logits with NaN or Inf among them, of which no token can be taken."""


LARGEST_SIZE = 2**40
"""Of a size, length or number of heads. None comes near it; far above it PyTorch could not even describe a tensor."""

DEEPEST = 2**16
"""Of a model or a cache, each of which takes time to build. The deepest published models have hundreds."""


def require_count(name: str, value: object, least: int = 1, most: int = LARGEST_SIZE) -> None:
    """Raises ConfigurationError unless `value` is a whole number from `least` to `most`."""
    if type(value) is not int or value < least:
        raise ConfigurationError(f"{name}: expected a whole number (int) of at least {least}, got {value!r:.200}")
    if value > most:
        raise ConfigurationError(f"{name}: expected a whole number of at most {most:,}, got a larger one")


def require_number(
    name: str, value: object, *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf
) -> None:
    """Raises ConfigurationError unless `value` is a finite number in these bounds."""
    number = _as_float(value)
    if math.isfinite(number) and above < number < below and number >= least:
        return
    bounds = [
        f"above {above:g}" if above > -math.inf else "",
        f"of at least {least:g}" if least > -math.inf else "",
        f"below {below:g}" if below < math.inf else "",
    ]
    wanted = " and ".join(filter(None, bounds))
    raise ConfigurationError(f"{name}: expected a finite number {wanted}, got {value!r:.200}")


def require_flag(name: str, value: object) -> None:
    """Raises ConfigurationError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}: expected True or False, got {value!r:.200}")


def _as_float(value: object) -> float:
    """NaN for what is no number, or a whole one that is too large for a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
