"""Relative position bias in buckets of distances (T5, arXiv 1910.10683)."""

import math

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, require_count, require_flag
from .constant import Constant
from .scheme import ScoreBias


class RelativePositionBias(ScoreBias):
    """T5's relative position bias: adds a learned number per head and per bucket of the distance to each score.

    Half of the buckets of one direction contain one distance each. The others widen logarithmically up to
    `max_distance`; all greater distances share the last bucket. With `bidirectional=True` (an encoder) keys ahead of
    the query have their own half of the buckets; else they share bucket 0. The numbers are `embedding.weight`
    [num_buckets, H].

    Raises ConfigurationError for counts of heads, buckets or distances that leave no logarithmic bucket in a direction.
    """

    token_wise = True

    def __init__(
        self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = False
    ) -> None:
        super().__init__()
        for name, count in (("num_heads", num_heads), ("num_buckets", num_buckets), ("max_distance", max_distance)):
            require_count(name, count)
        require_flag("bidirectional", bidirectional)
        directions = 2 if bidirectional else 1
        if num_buckets < 2 * directions or num_buckets % directions:
            raise ConfigurationError(
                f"num_buckets: expected at least {2 * directions}, and an even number if bidirectional, "
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
        self._edges = Constant(self._all_edges)
        self._order = Constant(self._all_buckets)

    def reset_parameters(self) -> None:
        """Initialises the numbers of all buckets, as the constructor does."""
        self.embedding.reset_parameters()

    @property
    def reach(self) -> tuple[int, int] | None:
        """All greater distances, and those to keys ahead, share a bucket; rounding may move an edge.

        None for a subclass, which may give them numbers of their own.
        """
        if type(self) is not RelativePositionBias:
            return None
        return (-2 * self.max_distance if self.bidirectional else 0), 2 * self.max_distance

    def bias(self, distance: Tensor) -> Tensor:
        """`distance` int64 [..., L, S] to a bias [..., H, L, S] in the dtype of the embedding."""
        bias: Tensor = self.embedding(self.bucket(distance))
        return bias.movedim(-1, -3)

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each distance (query position minus key position), int64, same shape."""
        # Found by the edges between buckets: a table of all distances would grow with the longest distance.
        index = torch.bucketize(distance, self._edges.for_device_of(distance), right=True)
        return self._order.for_device_of(distance)[index]

    @property
    def _per_direction(self) -> int:
        return self.num_buckets // 2 if self.bidirectional else self.num_buckets

    def _all_edges(self) -> Tensor:
        """int64, ascending: the smallest distance of each bucket except the first, beginning with the keys ahead."""
        first = self._first_distances()
        return torch.cat((1 - first.flip(0), first)) if self.bidirectional else first

    def _all_buckets(self) -> Tensor:
        """int64: the bucket before each edge, and the bucket after the last edge."""
        behind = torch.arange(self._per_direction, dtype=torch.int64, device="cpu")
        return torch.cat((self._per_direction + behind[1:].flip(0), behind)) if self.bidirectional else behind

    def _first_distances(self) -> Tensor:
        """int64 [per_direction - 1]: the first distance of each bucket of one direction except bucket 0."""
        bucket = torch.arange(1, self._per_direction, dtype=torch.int64, device="cpu")
        # Binary search: `low` is in an earlier bucket, `high` in this bucket or a later one.
        low, high = torch.zeros_like(bucket), torch.full_like(bucket, 2 * self.max_distance)
        for _ in range((2 * self.max_distance).bit_length()):
            middle = (low + high) // 2
            reached = self._bucket(middle) >= bucket
            low, high = low.where(reached, middle), middle.where(reached, high)
        return high

    def _bucket(self, distance: Tensor) -> Tensor:
        """The bucket of distances of at least 0, in one direction."""
        exact = self._per_direction // 2
        # In float32, as in the published models: the edges of the logarithmic buckets depend on the rounding.
        growth = torch.log(distance.clamp(min=exact).float() / exact) / math.log(self.max_distance / exact)
        widening = exact + (growth * (self._per_direction - exact)).long()
        return torch.where(distance < exact, distance, widening.clamp(max=self._per_direction - 1))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_buckets={self.num_buckets}, max_distance={self.max_distance}, "
            f"bidirectional={self.bidirectional}"
        )
