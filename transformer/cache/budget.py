"""Budget of a layer's cache: the most tokens after a call, and the policy that says which."""

from typing import Any, NamedTuple

from ..errors import ConfigurationError, require_count, shown
from .compress import check_observed
from .contents import CacheContents
from .lengths import Lengths
from .policy import NOTHING, AnyPolicy, Needs, check_policy, is_policy
from .state import SelfAttentionState


class CacheBudget(NamedTuple):
    """At most `tokens` of each row are cached after a call; `policy` says which."""

    tokens: int
    policy: AnyPolicy

    @classmethod
    def of(cls, given: Any, num_sinks: int = 0) -> "CacheBudget | None":
        """The budget of `(tokens, policy)`, or None. Raises ConfigurationError for anything else, and for so few tokens
        that the sinks of a window, and those that the policy always keeps, take them all."""
        if given is None:
            return None
        if not isinstance(given, tuple | list) or len(given) != 2 or not is_policy(given[1]):
            raise ConfigurationError(
                f"cache_budget: expected None, or (tokens, policy) with a policy of transformer.cache.policies or a "
                f"function, got {shown(given)}"
            )
        require_count("cache_budget, tokens", given[0], least=num_sinks + 1)
        check_policy("cache_budget", given[0], given[1], num_sinks, ConfigurationError)
        return cls(*given)

    def __repr__(self) -> str:
        return f"({self.tokens}, {self.policy!r})"

    def max_cached_lengths(self, prompt: Lengths, total: Lengths) -> Lengths:
        """The most tokens of each row while a generation runs: those of its first call, and then one at a time."""
        return total.minimum(prompt.maximum(self.tokens + 1))

    def needs_after(self, contents: CacheContents | None) -> Needs:
        """What the policy needs of a call after these contents. Raises CacheStateError where earlier calls did not keep
        it."""
        needs = Needs.of(self.policy)
        state = None if contents is None or needs == NOTHING else contents.state
        if state is not None and max(state.length):
            check_observed(self.policy, state.observed if isinstance(state, SelfAttentionState) else None)
        return needs
