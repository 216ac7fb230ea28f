"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

from collections import OrderedDict

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .scheme import Positions, RotaryTable, Rotation

BLOCK = 2048
"""Positions per cached block of the table; a run inside one block costs two slices."""

BLOCKS_KEPT = 8


class RotaryEmbedding(Rotation):
    """Turns pairs of dimensions of queries and keys by angles that grow with the position.

    The first `rotary_dim` dimensions of a head are turned, the rest pass. Pair `i` turns by
    `position * base ** (-2 i / rotary_dim)`. With `interleaved=False` dimension `i` is paired with
    `i + rotary_dim / 2` (GPT-NeoX, Llama in transformers), with `interleaved=True` dimension `2 i` with `2 i + 1`
    (the paper, GPT-J). Angles are formed in float64 on the CPU and hold to 1e-6 at position 4,000,000; tables are kept
    beside the module, not in it, so `.to(bfloat16)` leaves them exact. One object may serve every layer of a model.

    Raises ConfigurationError for a `head_dim` below 2, an odd or too large `rotary_dim`, or a `base` not above 0.
    """

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        *,
        rotary_dim: int | None = None,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
            raise ConfigurationError(
                f"rotary_dim: expected an even number from 2 to head_dim={head_dim}, got {rotary_dim}"
            )
        if not 0.0 < base < float("inf"):
            raise ConfigurationError(f"base: expected a finite number above 0, got {base}")
        self.head_dim = head_dim
        self.base = base
        self.rotary_dim = rotary_dim
        self.interleaved = interleaved
        self._blocks: OrderedDict[tuple[int, torch.dtype, torch.device], RotaryTable] = OrderedDict()

    def table(self, positions: Positions, like: Tensor | None = None) -> RotaryTable:
        """Cosines and sines at `positions`: [L, rotary_dim] for a range, [B, 1, L, rotary_dim] for a tensor [B, L].

        float64 where `like` is float64, else float32: 16-bit heads are turned in float32.
        """
        dtype = torch.float64 if like is not None and like.dtype == torch.float64 else torch.float32
        device = torch.device("cpu") if like is None else like.device
        if isinstance(positions, range):
            first, block = positions.start % BLOCK, positions.start // BLOCK
            if first + len(positions) <= BLOCK:
                cos, sin = self._block(block, dtype, device)
                return RotaryTable(cos.narrow(0, first, len(positions)), sin.narrow(0, first, len(positions)))
            return self._angles(torch.arange(positions.start, positions.stop), dtype, device)
        cos, sin = self._angles(positions, dtype, device)
        return RotaryTable(cos.unsqueeze(-3), sin.unsqueeze(-3))

    def rotate(self, x: Tensor, table: RotaryTable) -> Tensor:
        """`x` [B, H, L, D] turned by the table's angles; same shape and dtype."""
        turning = x if self.rotary_dim == self.head_dim else x[..., : self.rotary_dim]
        if x.dtype is not table.cos.dtype:
            turning = turning.to(table.cos.dtype)
        turned = torch.addcmul(turning * table.cos, self._partner(turning), table.sin)
        if x.dtype is not table.cos.dtype:
            turned = turned.to(x.dtype)
        return turned if self.rotary_dim == self.head_dim else torch.cat((turned, x[..., self.rotary_dim :]), -1)

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, base={self.base}, rotary_dim={self.rotary_dim}, interleaved={self.interleaved}"
        )

    def __getstate__(self) -> dict[str, object]:
        # The table is worked out again where it is needed: a copy or a file need not carry it.
        return {**self.__dict__, "_blocks": OrderedDict()}

    def _partner(self, x: Tensor) -> Tensor:
        """Each dimension's partner in its pair, in its place; the sine's sign is in the table."""
        if self.interleaved:
            return x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).flip(-1).flatten(-2)
        return x.roll(self.rotary_dim // 2, -1)

    def _block(self, block: int, dtype: torch.dtype, device: torch.device) -> RotaryTable:
        key = (block, dtype, device)
        table = self._blocks.get(key)
        if table is None:
            table = self._angles(torch.arange(block * BLOCK, (block + 1) * BLOCK), dtype, device)
            self._blocks[key] = table
            while len(self._blocks) > BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        return table

    @torch.inference_mode(False)
    @torch.no_grad()
    def _angles(self, positions: Tensor, dtype: torch.dtype, device: torch.device) -> RotaryTable:
        pair = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64)
        frequency = self.base ** (-pair / self.rotary_dim)
        angle = positions.to("cpu", torch.float64).unsqueeze(-1) * frequency
        cos, sin = angle.cos(), angle.sin()
        if self.interleaved:
            cos, sin = cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)
        else:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return RotaryTable(cos.to(device, dtype), sin.to(device, dtype))
