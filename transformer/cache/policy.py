"""Policy of a compression: scores of cached tokens, by which `compress` and a `cache_budget` choose those to keep.

A policy is any callable `by(keys, values, *, positions, queries=None, weights=None)` that gives scores [B, G, S] of
floats; the highest are kept, of equal ones the newest. `keys`, `values` [B, G, S, D] are the cached tokens in order of
position as attention reads them (keys are rotated), `positions` int64 [B, G, S] their positions: below zero in the
columns after the last token of a shorter row, whose scores do not count. NaN counts as -inf. All of these are read
only: they may be the cache's own tensors, which forks share.

A `Policy` may need more. `queries` [B, H, n, D] are the last n of each row, rotated, the newest at the end, zeros
before a row's first. `weights` [B, G, S] are the attention weights that each token has had from all queries so far,
summed over the queries and the H / G heads of its group.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..errors import ArgumentError, ConfigurationError, require_count, require_flag, shown


class Policy(ABC):
    """A policy that says what it needs beside keys, values and positions."""

    @property
    def needs_queries(self) -> int:
        """How many of the last queries it is given."""
        return 0

    @property
    def needs_weights(self) -> bool:
        """Whether it is given the summed attention weights."""
        return False

    @property
    def always_kept(self) -> int:
        """How many tokens of a row it keeps whatever else there is, such as the newest: of so few it has no choice."""
        return 0

    @abstractmethod
    def __call__(
        self,
        keys: Tensor,
        values: Tensor,
        *,
        positions: Tensor,
        queries: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Scores [B, G, S] of the tokens; the highest are kept."""


AnyPolicy = Policy | Callable[..., Tensor]
"""A `Policy`, or a function that needs neither queries nor weights."""


class Needs(NamedTuple):
    """How many of the last queries a policy needs, and whether it needs summed weights."""

    queries: int = 0
    weights: bool = False

    @classmethod
    def of(cls, by: AnyPolicy) -> "Needs":
        """The needs of this policy, which `check_policy` has checked; none of a bare function."""
        return cls(by.needs_queries, by.needs_weights) if isinstance(by, Policy) else NOTHING


NOTHING = Needs()


def is_policy(by: object) -> bool:
    """True for what can be called; a class would make a policy, and is none."""
    return callable(by) and not isinstance(by, type)


def check_policy(
    name: str, tokens: int, by: AnyPolicy, num_sinks: int, error: type[ArgumentError | ConfigurationError]
) -> None:
    """Raises ConfigurationError where what a policy says of itself is no number, and `error` where it has no choice: it
    always keeps so many that with a module's sinks they are all of the `tokens` that the argument `name` gives."""
    if not isinstance(by, Policy):
        return
    require_count(f"needs_queries of {shown(by)}", by.needs_queries, least=0)
    require_flag(f"needs_weights of {shown(by)}", by.needs_weights)
    kept = by.always_kept
    require_count(f"always_kept of {shown(by)}", kept, least=0)
    if kept and tokens <= num_sinks + kept:
        always = f"which {shown(by)} always keeps"
        if num_sinks:
            always = f"since {shown(by)} always keeps {kept}, and {num_sinks} sinks stay"
        raise error(
            f"{name}: expected more than {num_sinks + kept} tokens, {always}, got {tokens}; "
            "give more, or a policy that always keeps fewer"
        )
