"""Float codecs: numbers in another float dtype, without a scale."""

import torch
from torch import Tensor

from .codec import Codec, bytes_of


class FloatCodec(Codec):
    """Numbers rounded to a float dtype: those beyond its range become infinite, as in any cast to it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = str(dtype).removeprefix("torch.")

    def record_bytes(self, head_dim: int) -> int:
        """As many numbers of the dtype."""
        return head_dim * self.dtype.itemsize

    def encode(self, numbers: Tensor) -> Tensor:
        """Numbers in the dtype, as bytes."""
        return bytes_of(numbers.to(self.dtype))

    def decode(self, records: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
        """The numbers as they are stored, in `dtype`."""
        return records.view(self.dtype)[..., :head_dim].to(dtype)
