"""What blocks refuse at construction: numbers that cannot work."""

import math

from ..errors import ConfigurationError


def check_width(name: str, value: int) -> None:
    """Raises ConfigurationError unless `value` is a whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise ConfigurationError(f"{name}: expected a whole number of at least 1, got {value!r}")


def check_eps(eps: float) -> None:
    """Raises ConfigurationError unless `eps` is finite and at least 0."""
    if not 0.0 <= eps < math.inf:
        raise ConfigurationError(f"eps: expected a finite number of at least 0, got {eps}")


def check_dropout(dropout: float) -> None:
    """Raises ConfigurationError unless `dropout` is a share below 1."""
    if not 0.0 <= dropout < 1.0:
        raise ConfigurationError(f"dropout: expected a number from 0 to below 1, got {dropout}")
