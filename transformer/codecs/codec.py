"""Interface of a codec: encodes one key or value vector as bytes, and decodes it.

A record contains all that its vector needs, its scale too, so a buffer of records has slots as one of numbers has:
whatever moves, copies, selects or saves slots does not know what is in them.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Codec(ABC):
    """How a vector of `D` numbers is stored as a record of bytes.

    Each vector is encoded alone and once, so results do not depend on how tokens are split into calls.

    A record of zeros is a vector of zeros. NaN and infinity never become finite: they come back as they were, or, where
    numbers share a scale, as NaN in all of these.
    """

    name: str
    """The word for it in `cache_dtype=`."""

    @abstractmethod
    def record_bytes(self, head_dim: int) -> int:
        """Bytes of the record of one vector."""

    @abstractmethod
    def encode(self, numbers: Tensor) -> Tensor:
        """Records uint8 [..., bytes] of vectors [..., D] of any float dtype."""

    @abstractmethod
    def decode(self, records: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
        """The vectors [..., head_dim] in a float dtype."""


def bytes_of(numbers: Tensor) -> Tensor:
    """The numbers [..., N] as the bytes that they are, uint8 [..., N * itemsize]."""
    # As one row first: a dimension of one number has any stride, but a view in another dtype needs 1.
    flat = numbers.contiguous().view(-1).view(torch.uint8)
    return flat.view(*numbers.shape[:-1], numbers.shape[-1] * numbers.element_size())
