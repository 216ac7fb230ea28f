"""Policies that come with the library, each with its paper; `policy.py` says what a policy is given."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError, require_count
from .policy import AnyPolicy, Policy

__all__ = ["AccumulatedAttention", "AnyPolicy", "KeyNorm", "LastQueries", "Policy", "Random", "SinksAndNewest"]

INFINITY = float("inf")


@dataclass(frozen=True)
class KeyNorm(Policy):
    """Keeps the tokens whose keys have the smallest norms, which tend to get most attention (arXiv 2406.11430)."""

    def __call__(self, keys: Tensor, values: Tensor, **_: Any) -> Tensor:  # noqa: ARG002 (policies are called alike)
        return -_widened(keys).square().sum(-1)


@dataclass(frozen=True)
class LastQueries(Policy):
    """Keeps the last `window` tokens, and those that their queries attend to most (SnapKV, arXiv 2404.14469).

    Weights of the last `window` queries, in causal order and with scale `D ** -0.5`, are summed over the queries and
    the heads of a group. A token counts as the largest of the `kernel_size` tokens around it, so that neighbours stay
    together. Biases, soft caps and rules of the module are not known here.

    Raises ConfigurationError unless both are whole numbers of at least 1, and `kernel_size` is odd.
    """

    window: int = 32
    kernel_size: int = 7

    def __post_init__(self) -> None:
        require_count("window", self.window)
        require_count("kernel_size", self.kernel_size)
        if self.kernel_size % 2 == 0:
            raise ConfigurationError(f"kernel_size: expected an odd number, got {self.kernel_size}")

    @property
    def needs_queries(self) -> int:
        return self.window

    @property
    def always_kept(self) -> int:
        return self.window

    def __call__(
        self,
        keys: Tensor,
        values: Tensor,  # noqa: ARG002
        *,
        positions: Tensor,
        queries: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if queries is None:
            raise RuntimeError("LastQueries: expected the last queries")
        batch, groups, tokens, head_dim = keys.shape
        newest = positions.amax((1, 2), keepdim=True)
        at = newest + torch.arange(1 - queries.shape[2], 1, device=keys.device)
        key_at, query_at = positions[:, :, None, None, :], at[:, :, None, :, None]
        visible = (key_at >= 0) & (key_at <= query_at)
        # The queries of a group in one product with its keys, which then are not repeated.
        grouped = _widened(queries).reshape(batch, groups, -1, head_dim) * head_dim**-0.5
        scores = (grouped @ _widened(keys).mT).view(batch, groups, -1, queries.shape[2], tokens)
        # Finite, and hidden once more: a query may be before the first token, or see none of those that are left.
        lowest = torch.finfo(scores.dtype).min
        shares = scores.masked_fill(~visible, lowest).softmax(-1).masked_fill(~visible, 0.0)
        votes = shares.sum((2, 3)).view(batch * groups, 1, tokens)
        pooled = F.max_pool1d(votes, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return pooled.view(batch, groups, tokens).masked_fill(positions > newest - self.window, INFINITY)


@dataclass(frozen=True)
class AccumulatedAttention(Policy):
    """Keeps the last `newest` tokens, and those that have had most attention so far (H2O, arXiv 2306.14048).

    The paper gives half of its tokens to the newest: a token that was read lately has had few queries.
    Raises ConfigurationError unless `newest` is a whole number of at least 0.
    """

    newest: int = 32

    def __post_init__(self) -> None:
        require_count("newest", self.newest, least=0)

    @property
    def needs_weights(self) -> bool:
        return True

    @property
    def always_kept(self) -> int:
        return self.newest

    def __call__(
        self,
        keys: Tensor,  # noqa: ARG002
        values: Tensor,  # noqa: ARG002
        *,
        positions: Tensor,
        weights: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if weights is None:
            raise RuntimeError("AccumulatedAttention: expected the summed weights")
        return weights.masked_fill(positions > positions.amax((1, 2), keepdim=True) - self.newest, INFINITY)


@dataclass(frozen=True)
class SinksAndNewest(Policy):
    """Keeps the first `sinks` tokens and the newest (StreamingLLM, arXiv 2309.17453, at their true positions).

    A module's own sinks (`num_sinks`) stay under every policy: there `SinksAndNewest(0)` is enough.
    Raises ConfigurationError unless `sinks` is a whole number of at least 0.
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        require_count("sinks", self.sinks, least=0)

    @property
    def always_kept(self) -> int:
        return self.sinks

    def __call__(self, keys: Tensor, values: Tensor, *, positions: Tensor, **_: Any) -> Tensor:  # noqa: ARG002
        # Rounding keeps the order, and of equal scores the newest win.
        return positions.float().masked_fill(positions < self.sinks, INFINITY)


@dataclass(frozen=True)
class Random(Policy):
    """Keeps tokens at random: each position of each head has a number of its own, which `seed` decides.

    The same in every run, on every device and in every row. Over any number of steps the tokens that are kept are a
    uniform choice among all that were read. Raises ConfigurationError unless `seed` is a whole number of at least 0.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        require_count("seed", self.seed, least=0)

    def __call__(self, keys: Tensor, values: Tensor, *, positions: Tensor, **_: Any) -> Tensor:  # noqa: ARG002
        head = torch.arange(positions.shape[1], device=positions.device).unsqueeze(-1)
        mixed = positions
        for number in (head, self.seed):
            mixed = _mixed(mixed ^ _mixed(torch.as_tensor(number, device=positions.device) + 1))
        return (mixed & 0xFFFFFF).float()


def _mixed(numbers: Tensor) -> Tensor:
    """A bijection of int64 numbers that spreads each bit over all others; products wrap around."""
    for factor in (-0x61C8864680B583EB, 0x27BB2EE687B0B0FD):
        numbers = numbers * factor
        numbers = numbers ^ (numbers >> 32 & 0xFFFFFFFF)
    return numbers


def _widened(x: Tensor) -> Tensor:
    """In at least float32."""
    return x if x.dtype is torch.float64 else x.float()
