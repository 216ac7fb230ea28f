"""Absolute position embeddings, added to a model's input: learned vectors, and sinusoids (arXiv 1706.03762)."""

from functools import partial

import torch
from torch import Tensor, nn

from .. import masks
from ..errors import ArgumentError, DeviceError, DtypeError, ShapeError, require_count, require_flag, require_number
from ..plain import plain_weight
from ..tracing import is_traced
from .angles import Angles
from .scaling import plain_frequencies
from .scheme import AbsolutePositions, TokenPositions
from .table import BlockTable


class LearnedPositions(AbsolutePositions):
    """Learned position embedding (BERT, arXiv 1810.04805; GPT): one vector for each position below `max_length`.

    The vectors are `embedding.weight` [max_length + offset, E]: position `p` has row `p + offset`, and no token has one
    of the first `offset` rows (RoBERTa, BART and OPT have two of them).

    Raises ConfigurationError for a `max_length` or `embed_dim` that is not a whole number from 1, or an `offset` that
    is not one from 0. A call raises ArgumentError if a row would exceed `max_length`, and ShapeError, DtypeError or
    DeviceError if `x` does not fit the module or the step.
    """

    def __init__(self, max_length: int, embed_dim: int, offset: int = 0) -> None:
        super().__init__()
        require_count("max_length", max_length)
        require_count("embed_dim", embed_dim)
        require_count("offset", offset, least=0)
        self.max_length = max_length
        self.embed_dim = embed_dim
        self.offset = offset
        self.embedding = nn.Embedding(max_length + offset, embed_dim)

    @property
    def positions_limit(self) -> int | None:
        """`max_length`."""
        return self.max_length

    def reset_parameters(self) -> None:
        """Initialises the vectors of all positions, as the constructor does."""
        self.embedding.reset_parameters()

    def forward(self, x: Tensor, step: TokenPositions) -> Tensor:
        """`x` [B, L, E] with the vector of each token's position added, and nothing at padding; same dtype."""
        _check_input(x, self.embed_dim, step)
        weight = plain_weight(self.embedding, nn.Embedding)
        if weight is not None:
            _check_like_weight(x, weight)
        if step.at is not None:
            # The positions are on the device: its lookup raises for cached rows that become too long.
            if x.shape[1] > self.max_length and step.position_ids is None:
                raise ArgumentError(
                    f"max_length: expected at most {self.max_length} tokens, got {x.shape[1]} in this call; give fewer"
                )
        elif step.position_ids is not None:
            self._check_given(step.position_ids)
        elif max(step.total_lengths) > self.max_length:
            raise ArgumentError(
                f"max_length: expected rows of at most {self.max_length} tokens, got {max(step.past_lengths)} before "
                f"and {max(step.total_lengths)} after this call; give fewer, or clear the cache"
            )
        positions = step.token_positions
        if isinstance(positions, range):
            rows = range(positions.start + self.offset, positions.stop + self.offset)
            added = self.embedding(masks.positions(rows, x.device))
        else:
            at = positions.clamp(min=0)
            added = _without_padding(self.embedding(at + self.offset if self.offset else at), positions)
        total: Tensor = x + added
        return total.to(x.dtype)

    def extra_repr(self) -> str:
        return f"max_length={self.max_length}, embed_dim={self.embed_dim}, offset={self.offset}"

    def _check_given(self, position_ids: Tensor) -> None:
        """Raises ArgumentError for a position beyond the last one; on other devices than the CPU the lookup raises."""
        if position_ids.is_cpu and not is_traced(position_ids) and position_ids.numel():
            last = int(position_ids.max())
            if last >= self.max_length:
                raise ArgumentError(f"position_ids: expected positions below max_length={self.max_length}, got {last}")


class SinusoidalPositions(AbsolutePositions):
    """Sinusoidal position embedding (Attention Is All You Need, arXiv 1706.03762), without parameters.

    Dimension `2 i` gets `sin(position * base ** (-2 i / E))`, dimension `2 i + 1` the cosine. `interleaved=False`: all
    sines come before all cosines, as in Marian. The length is unlimited.
    Values are computed in float64 on the CPU and are exact to 1e-6 at position 4,000,000; a cast of the module does
    not change them. The sum is computed in float32 (in float64 if `x` is float64) and then rounded to the dtype of `x`.

    Raises ConfigurationError for an `embed_dim` that is not a whole number from 1, a `base` that is not above 0, or an
    `interleaved` that is no bool. A call raises ShapeError, DtypeError or DeviceError if `x` does not fit the module or
    the step.
    """

    def __init__(self, embed_dim: int, base: float = 10000.0, *, interleaved: bool = True) -> None:
        super().__init__()
        require_count("embed_dim", embed_dim)
        require_number("base", base, above=0.0)
        require_flag("interleaved", interleaved)
        self.embed_dim = embed_dim
        self.base = base
        self.interleaved = interleaved
        self._angles = Angles(partial(plain_frequencies, float(base), embed_dim))
        self._table = BlockTable()

    def forward(self, x: Tensor, step: TokenPositions) -> Tensor:
        """`x` [B, L, E] with the sinusoids of each token's position added, and nothing at padding; same dtype."""
        _check_input(x, self.embed_dim, step)
        if not x.is_floating_point():
            raise DtypeError(f"x: expected a floating-point tensor, got {x.dtype}; embed the tokens first")
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        positions = step.token_positions
        if is_traced(x):
            given = positions if isinstance(positions, Tensor) else masks.positions(positions, x.device)
            added = _without_padding(self._sines_and_cosines(self._angles.traced(given, dtype)).to(dtype), given)
            return (x + added).to(x.dtype)
        self._angles.prepare(x.device)
        if isinstance(positions, range):
            (added,) = self._table.rows(self._sinusoids, positions, dtype, x.device)
        elif step.at is not None or step.position_ids is not None:
            (added,) = self._table.rows(self._sinusoids, positions, dtype, x.device)
            added = _without_padding(added, positions)
        elif step.has_gaps:
            (added,) = self._table.rows(self._sinusoids, step.host_positions, dtype, x.device)
        else:
            added = self._ragged(positions, step, dtype)
        return (x + added).to(x.dtype)

    def add_at(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` [B, L, E] with the sinusoids of `positions`, int64 [1 or B, L] from 0 on, added; same dtype."""
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        if is_traced(x):
            added = self._sines_and_cosines(self._angles.traced(positions, dtype)).to(dtype)
        else:
            (added,) = self._table.rows(self._sinusoids, positions, dtype, x.device)
        return (x + added).to(x.dtype)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, base={self.base}, interleaved={self.interleaved}"

    def _ragged(self, positions: Tensor, step: TokenPositions, dtype: torch.dtype) -> Tensor:
        """The embeddings [B, L, E] of rows that differ in length or have padding.

        Computed from the lengths that the host knows, so that the host does not wait for `positions` of the device.
        """
        if step.width == 0:
            return torch.zeros((), dtype=dtype, device=positions.device)
        run = range(min(step.past_lengths), max(step.total_lengths))
        if len(run) <= step.batch * step.width:
            (rows,) = self._table.rows(self._sinusoids, run, dtype, positions.device)
            rows, column = rows.unsqueeze(0), positions - run.start
        else:
            # The rows' lengths differ by more than a table should cover: only the new positions of each row.
            past = torch.tensor(step.past_lengths, dtype=torch.int64, device="cpu").unsqueeze(-1)
            new = past + torch.arange(step.width, dtype=torch.int64, device="cpu")
            (rows,) = self._table.rows(self._sinusoids, new, dtype, positions.device)
            column = positions - past.to(positions.device, non_blocking=True)
        return _without_padding(rows.take_along_dim(column.clamp(min=0).unsqueeze(-1), 1), positions)

    def _sinusoids(self, positions: Tensor) -> tuple[Tensor]:
        return (self._sines_and_cosines(self._angles.exact(positions)),)

    def _sines_and_cosines(self, angle: Tensor) -> Tensor:
        both = angle.sin(), angle.cos()
        joined = torch.stack(both, -1).flatten(-2) if self.interleaved else torch.cat(both, -1)
        return joined[..., : self.embed_dim]


def _without_padding(added: Tensor, positions: Tensor) -> Tensor:
    return added.masked_fill((positions < 0).unsqueeze(-1), 0.0)


def _check_input(x: Tensor, embed_dim: int, step: TokenPositions) -> None:
    if x.ndim != 3 or x.shape[2] != embed_dim:
        raise ShapeError(f"x: expected [B, L, {embed_dim}], got {list(x.shape)}")
    if tuple(x.shape[:2]) != (step.batch, step.tokens):
        raise ShapeError(
            f"x: expected [{step.batch}, {step.tokens}, {embed_dim}], as the step was planned for, "
            f"got {list(x.shape)}; plan a step with this x"
        )
    if x.device != step.device:
        raise DeviceError(f"x: expected a tensor on {step.device}, as the step, got {x.device}; move one of them")


def _check_like_weight(x: Tensor, weight: Tensor) -> None:
    if x.dtype is not weight.dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
        raise DtypeError(
            f"x: expected {weight.dtype}, as the module's weights, got {x.dtype}; convert one of them with .to()"
        )
    if x.device != weight.device:
        raise DeviceError(
            f"x: expected a tensor on {weight.device}, as the module's weights, got {x.device}; move one of them"
        )
