"""Scaled codecs: numbers of 8 bits, and one scale for each vector.

A vector is that of one token and one key/value head, so a scale never waits for other tokens, and a token that is
stored is never rounded again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .codec import Codec, bytes_of

SCALE_BYTES = 4
"""Bytes of the scale, float32, at the front of a record."""

_ALIGNMENT = 4
"""Bytes to whose multiple a record is filled up with zeros, so that the scale of the next one can be read as it is."""


class ScaledCodec(Codec):
    """Numbers as `scale * code`, with the codes of a dtype of 8 bits of which `most` is the largest.

    The scale is the largest size in the vector, divided by `most`: the error of int8 is at most half a scale.
    """

    def __init__(self, dtype: torch.dtype, most: float) -> None:
        self.dtype = dtype
        self.most = most
        self.name = str(dtype).removeprefix("torch.")

    def record_bytes(self, head_dim: int) -> int:
        """The scale, and a byte for each number."""
        return SCALE_BYTES + -(-head_dim // _ALIGNMENT) * _ALIGNMENT

    def encode(self, numbers: Tensor) -> Tensor:
        """Scales and codes."""
        head_dim, numbers = numbers.shape[-1], numbers.float()
        scale = numbers.abs().amax(-1, keepdim=True) / self.most
        # A vector of zeros has a scale of 0, and codes of 0.
        codes = numbers / scale.masked_fill(scale == 0.0, 1.0)
        if not self.dtype.is_floating_point:
            codes = codes.round()
        # Division by a rounded scale, and of the smallest numbers by one with few bits, may come out larger.
        codes = bytes_of(codes.clamp(-self.most, self.most).to(self.dtype))
        return torch.cat((bytes_of(scale), F.pad(codes, (0, -head_dim % _ALIGNMENT))), -1)

    def decode(self, records: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
        """Codes times scales, formed in float32."""
        scale = records[..., :SCALE_BYTES].view(torch.float32)
        codes = records[..., SCALE_BYTES : SCALE_BYTES + head_dim].view(self.dtype)
        return (codes.float() * scale).to(dtype)
