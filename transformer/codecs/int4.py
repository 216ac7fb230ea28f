"""Codec of 4 bits: groups of 32 channels, each with a least number and a step of its own.

A key has a few channels that are larger than the others, token after token. With one scale, a few large channels would
leave too few levels for the others; with groups they do so only in their own (KIVI groups along tokens, arXiv
2402.02750, and must then wait for a whole group of tokens).
"""

import torch
from torch import Tensor

from .codec import Codec, bytes_of

GROUP = 32
"""Channels that share a least number and a step."""

HEADER_BYTES = 4
"""Bytes of a group's header: least number and step, in bfloat16, which has the range of float32."""

_MOST = 15


class Int4Codec(Codec):
    """Numbers as `least + step * code`, codes from 0 to 15; the error is about half a step.

    Record: the headers of all groups, then 16 bytes for each group. Byte i of these has channel i of the group in its
    lower and channel 16 + i in its upper half, so that a row of bytes becomes two rows of numbers. A last group of
    fewer channels is filled up.
    """

    name = "int4"

    def record_bytes(self, head_dim: int) -> int:
        """Headers and codes of all groups."""
        return -(-head_dim // GROUP) * (HEADER_BYTES + GROUP // 2)

    def encode(self, numbers: Tensor) -> Tensor:
        """Headers and codes."""
        numbers = numbers.float()
        if missing := -numbers.shape[-1] % GROUP:
            # Filled up with a number that is there, so that nothing becomes coarser by it.
            numbers = torch.cat((numbers, numbers[..., -1:].expand(*numbers.shape[:-1], missing)), -1)
        groups = numbers.reshape(*numbers.shape[:-1], numbers.shape[-1] // GROUP, GROUP)
        # Codes are found with the header as it is stored, which they then make up for.
        least = groups.amin(-1, keepdim=True).bfloat16()
        step = ((groups.amax(-1, keepdim=True) - least.float()) / _MOST).bfloat16()
        divisor = step.float().masked_fill(step == 0.0, 1.0)
        codes = ((groups - least.float()) / divisor).round().clamp(0, _MOST).to(torch.uint8)
        halves = codes[..., : GROUP // 2] | (codes[..., GROUP // 2 :] << 4)
        headers = bytes_of(torch.cat((least, step), -1))
        return torch.cat((headers.flatten(-2), halves.flatten(-2)), -1)

    def decode(self, records: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
        """Codes times steps above the least numbers, formed in float32."""
        groups = -(-head_dim // GROUP)
        shape, end = records.shape[:-1], HEADER_BYTES * groups
        headers = records[..., :end].view(torch.bfloat16).reshape(*shape, groups, 2).float()
        halves = records[..., end:].reshape(*shape, groups, GROUP // 2)
        codes = torch.cat((halves & _MOST, halves >> 4), -1).float()
        numbers = headers[..., :1] + headers[..., 1:] * codes
        return numbers.flatten(-2)[..., :head_dim].to(dtype)
