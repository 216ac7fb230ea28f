"""Relative position bias in buckets (T5, arXiv 1910.10683)."""

import math

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from .constant import Constant
from .scheme import ScoreBias


class RelativePositionBias(ScoreBias):
    """Adds to each score a learned number of its head and of the bucket that the distance falls in.

    Half of the buckets (of those of one direction) hold one distance each, the others widen logarithmically up to
    `max_distance`; all beyond shares the last. `bidirectional=True` (an encoder) gives keys ahead of the query their
    own half; else they share bucket 0. The numbers are `embedding.weight` [num_buckets, H].

    Raises ConfigurationError for head, bucket or distance counts that leave a direction without a logarithmic bucket.
    """

    def __init__(
        self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = False
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ConfigurationError(f"num_heads: expected at least 1, got {num_heads}")
        directions = 2 if bidirectional else 1
        if num_buckets < 2 * directions or num_buckets % directions:
            raise ConfigurationError(
                f"num_buckets: expected at least {2 * directions}, and an even number where bidirectional, "
                f"got {num_buckets}"
            )
        if max_distance <= num_buckets // directions // 2:
            raise ConfigurationError(
                f"max_distance: expected more than the {num_buckets // directions // 2} distances that have a bucket "
                f"of their own, got {max_distance}"
            )
        self.num_heads = num_heads
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.embedding = nn.Embedding(num_buckets, num_heads)
        # Beyond the longest distance nothing changes, so a table has them all.
        self._buckets = Constant(self._all_buckets)

    def reset_parameters(self) -> None:
        """Draws the numbers of all buckets anew, as the constructor does."""
        self.embedding.reset_parameters()

    def bias(self, distance: Tensor) -> Tensor:
        """`distance` int64 [..., L, S] to a bias [..., H, L, S] in the dtype of the embedding."""
        bias: Tensor = self.embedding(self.bucket(distance))
        return bias.movedim(-1, -3)

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each distance (query position minus key position), int64, same shape."""
        far = self.max_distance
        return self._buckets.beside(distance)[distance.clamp(-far, far) + far]

    def _all_buckets(self) -> Tensor:
        """int64 [2 * max_distance + 1], those of the keys farthest ahead first."""
        return self._bucket(torch.arange(-self.max_distance, self.max_distance + 1, dtype=torch.int64, device="cpu"))

    def _bucket(self, distance: Tensor) -> Tensor:
        if self.bidirectional:
            per_direction = self.num_buckets // 2
            ahead = (distance < 0).long() * per_direction
            distance = distance.abs()
        else:
            per_direction = self.num_buckets
            ahead = torch.zeros_like(distance)
            distance = distance.clamp(min=0)
        exact = per_direction // 2
        # float32, as in the published models: the edges of the logarithmic buckets depend on it.
        growth = torch.log(distance.clamp(min=exact).float() / exact) / math.log(self.max_distance / exact)
        widening = exact + (growth * (per_direction - exact)).long()
        widening = widening.clamp(max=per_direction - 1)
        return ahead + torch.where(distance < exact, distance, widening)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_buckets={self.num_buckets}, max_distance={self.max_distance}, "
            f"bidirectional={self.bidirectional}"
        )
