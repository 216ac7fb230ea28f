"""Rotary position embedding (RoPE; RoFormer, arXiv 2104.09864)."""

from functools import partial
from operator import methodcaller

import torch
from torch import Tensor

from ..errors import ConfigurationError, require_count, require_flag, require_number
from ..kernels import rotate_in_one_pass
from ..kernels.compiled import switch
from ..masks import positions as run_of_positions
from ..tracing import is_traced
from .angles import Angles
from .scaling import RotaryScaling, plain_frequencies
from .scheme import Positions, RotaryTable, Rotation
from .table import BLOCK, BlockTable


class RotaryEmbedding(Rotation):
    """Rotary position embedding: rotates pairs of dimensions of queries and keys by angles that grow with the position.

    The first `rotary_dim` dimensions of a head are rotated, the others stay as they are. Pair `i` rotates by
    `position * base ** (-2 i / rotary_dim)`, or by the frequencies of `scaling`, which also multiplies the rotated
    dimensions by its attention factor. With `interleaved=False` dimension `i` is paired with `i + rotary_dim / 2`
    (GPT-NeoX, Llama in transformers), with `interleaved=True` dimension `2 i` with `2 i + 1` (the paper, GPT-J).
    Angles are computed in float64 and are exact to 1e-6 at position 4,000,000. Frequencies and tables are not
    parameters or buffers, so `.to(bfloat16)` leaves them exact. All layers of a model can share one object.

    Raises ConfigurationError for a `head_dim` below 2, an odd or too large `rotary_dim`, a `base` that is not above 0,
    or a `scaling` that has no frequencies for them.
    """

    token_wise = True

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        *,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        scaling: RotaryScaling | None = None,
    ) -> None:
        super().__init__()
        require_count("head_dim", head_dim)
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        require_count("rotary_dim", rotary_dim)
        require_number("base", base, above=0.0)
        require_flag("interleaved", interleaved)
        if rotary_dim > head_dim or rotary_dim % 2:
            raise ConfigurationError(
                f"rotary_dim: expected an even number from 2 to head_dim={head_dim}, got {rotary_dim}"
            )
        self.head_dim = head_dim
        self.base = base
        self.rotary_dim = rotary_dim
        self.interleaved = interleaved
        self.scaling = scaling
        self._angles = Angles(partial(_frequencies, float(base), rotary_dim, scaling))
        self._table = BlockTable()

    def table(self, positions: Positions, like: Tensor | None = None) -> RotaryTable:
        """Cosines and sines at `positions`: [L, rotary_dim] for a range, [B, 1, L, rotary_dim] for a tensor [B, L].

        float64 if `like` is float64, else float32: 16-bit heads are rotated in float32.
        """
        like = torch.empty(0, dtype=torch.float32, device="cpu") if like is None else like
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if is_traced(like):
            given = positions if isinstance(positions, Tensor) else run_of_positions(positions, like.device)
            rows = self._cos_and_sin(self._angles.traced(given.to(like.device), dtype))
            cos, sin = (row.to(dtype) for row in rows)
        else:
            if not like.is_cpu:
                self._angles.prepare(like.device)
            if isinstance(positions, range) and len(positions) == 1:
                key, kept = self._table.latest
                if key == (positions.start // BLOCK, dtype, like.device):
                    return RotaryTable(*map(methodcaller("narrow", 0, positions.start % BLOCK, 1), kept))
            cos, sin = self._table.rows(self._formula, positions, dtype, like.device)
        if isinstance(positions, range):
            return RotaryTable(cos, sin)
        return RotaryTable(cos.unsqueeze(-3), sin.unsqueeze(-3))

    def rotate(self, x: Tensor, table: RotaryTable) -> Tensor:
        """`x` [B, H, L, D] rotated by the table's angles; same shape and dtype."""
        pairs = x if self.rotary_dim == self.head_dim else x[..., : self.rotary_dim]
        if x.dtype is not table.cos.dtype and (x.is_cpu or torch.is_grad_enabled()):
            # Elsewhere the operations below convert as they read: a launch less. Gradients are summed in float32.
            pairs = pairs.to(table.cos.dtype)
        # The two dimensions of each pair exchanged; the sign of the sine is in the table.
        if self.interleaved:
            exchanged = pairs.reshape(*pairs.shape[:-1], pairs.shape[-1] // 2, 2).flip(-1).flatten(-2)
        else:
            exchanged = pairs.roll(self.rotary_dim // 2, -1)
        rotated = torch.addcmul(pairs * table.cos, exchanged, table.sin)
        if x.dtype is not table.cos.dtype:
            rotated = rotated.to(x.dtype)
        return rotated if self.rotary_dim == self.head_dim else torch.cat((rotated, x[..., self.rotary_dim :]), -1)

    def rotate_both(self, query: Tensor, key: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor]:
        """Queries [B, H, L, D] and keys [B, G, L, D] of the same positions, rotated."""
        # Unless someone has replaced how one of them is rotated.
        own = type(self).rotate is RotaryEmbedding.rotate and "rotate" not in self.__dict__
        own = own and table.cos.shape[-1] == self.rotary_dim
        eager = not torch.is_grad_enabled() and not torch.compiler.is_dynamo_compiling()
        if own and eager and query.is_cuda and query.shape[2] == 1:
            # Launches take the time of a decode step, not numbers: both in the operations of one.
            heads = self.rotate(torch.cat((query, key), 1), table)
            return heads[:, : query.shape[1]], heads[:, query.shape[1] :]
        # Last: it imports numba.
        if own and eager and query.is_cpu and switch.are_available():
            both = rotate_in_one_pass(query, key, table.cos, table.sin, self.interleaved)
            if both is not None:
                return both
        return self.rotate(query, table), self.rotate(key, table)

    def extra_repr(self) -> str:
        shown = f"head_dim={self.head_dim}, base={self.base}, rotary_dim={self.rotary_dim}"
        scaling = "" if self.scaling is None else f", scaling={self.scaling}"
        return f"{shown}, interleaved={self.interleaved}{scaling}"

    def _formula(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._cos_and_sin(self._angles.exact(positions))

    def _cos_and_sin(self, angle: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = angle.cos(), angle.sin()
        if self.scaling is not None:
            cos, sin = cos * self.scaling.attention_factor, sin * self.scaling.attention_factor
        if self.interleaved:
            return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _frequencies(base: float, rotary_dim: int, scaling: RotaryScaling | None) -> Tensor:
    if scaling is None:
        return plain_frequencies(base, rotary_dim)
    if not isinstance(scaling, RotaryScaling):
        raise ConfigurationError(
            f"scaling: expected None or a RotaryScaling of transformer.positions, got {type(scaling).__name__}"
        )
    frequencies = scaling.frequencies(base, rotary_dim)
    wanted = (rotary_dim // 2,), torch.float64, "cpu"
    if (tuple(frequencies.shape), frequencies.dtype, frequencies.device.type) != wanted:
        raise ConfigurationError(
            f"scaling: expected frequencies float64 [{rotary_dim // 2}] on the CPU, got {frequencies.dtype} "
            f"{list(frequencies.shape)} on {frequencies.device} from {scaling}"
        )
    if not bool((frequencies.isfinite() & (frequencies > 0.0)).all()):
        raise ConfigurationError(
            f"scaling: expected finite frequencies above 0, got {frequencies.tolist()} from {scaling} with base={base} "
            f"and rotary_dim={rotary_dim}; give a smaller factor or length"
        )
    return frequencies
