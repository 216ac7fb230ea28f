"""Linear biases of attention scores (ALiBi, arXiv 2108.12409)."""

import math
from functools import partial

import torch
from torch import Tensor

from ..errors import require_count
from .constant import Constant
from .scheme import ScoreBias


class ALiBi(ScoreBias):
    """ALiBi: subtracts from each score the slope of its head times the distance between query and key.

    The slopes are those of the paper: `2 ** (-8 (i + 1) / H)` if `H` is a power of two; else the slopes of the next
    lower power of two, followed by every other slope of the next higher one. Keys behind the query and keys ahead of
    it (without causal order) get the same bias.

    Raises ConfigurationError for `num_heads` below 1.
    """

    heads: range | None = None
    """Which heads of more these are, as `of_heads` made them; None: all."""

    learned = False

    token_wise = True

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        require_count("num_heads", num_heads)
        self.num_heads = num_heads
        self._slopes = Constant(partial(_slopes, num_heads, torch.float32))
        self._exact_slopes = Constant(partial(_slopes, num_heads, torch.float64))

    def of_heads(self, heads: range) -> "ALiBi":
        """The same for some of the heads alone, in which a rank attends."""
        part = ALiBi(len(heads))
        part.heads = heads
        for name, dtype in (("_slopes", torch.float32), ("_exact_slopes", torch.float64)):
            setattr(part, name, Constant(partial(_slopes_of, self.num_heads, heads, dtype)))
        return part

    @property
    def slopes(self) -> Tensor:
        """The slopes of the heads, float32 [H], on the CPU: below 0, to be multiplied by the size of a distance."""
        return self._slopes.on(torch.device("cpu")).view(-1)

    def bias(self, distance: Tensor) -> Tensor:
        """`distance` int64 [..., L, S] to a float32 bias [..., H, L, S]."""
        return self.bias_for(distance, torch.float32)

    def bias_for(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """The same in `dtype`, float32 or float64."""
        slopes = self._exact_slopes if dtype is torch.float64 else self._slopes
        return distance.abs().unsqueeze(-3) * slopes.for_device_of(distance)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}" + ("" if self.heads is None else f", heads={self.heads}")


def _slopes(num_heads: int, dtype: torch.dtype) -> Tensor:
    """The negative slopes [H, 1, 1], on the CPU."""
    lower = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / lower) for i in range(lower)]
    between = [2.0 ** (-8.0 * (i + 1) / (2 * lower)) for i in range(0, 2 * lower, 2)]
    slopes += between[: num_heads - lower]
    return -torch.tensor(slopes, dtype=dtype, device="cpu").view(-1, 1, 1)


def _slopes_of(num_heads: int, heads: range, dtype: torch.dtype) -> Tensor:
    return _slopes(num_heads, dtype)[heads.start : heads.stop].clone()
