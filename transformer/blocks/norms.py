"""Root mean square and layer normalisation, each also with weights that count from one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_eps, check_width


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last dimension (arXiv 1910.07467).

    With `unit_offset=True` the factor is `1 + weight`, and weights begin at 0 (Gemma, arXiv 2403.08295). Statistics of
    16-bit tensors are formed in float32. `x` [..., dim] keeps its shape and dtype.

    Raises ConfigurationError for a `dim` below 1 or an `eps` that is not finite and at least 0.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        unit_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_width("dim", dim)
        check_eps(eps)
        self.dim = dim
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.full((dim,), 0.0 if unit_offset else 1.0, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., dim] to the same shape."""
        return F.rms_norm(x, (self.dim,), _factor(self.weight, self.unit_offset), self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, unit_offset={self.unit_offset}"


class LayerNorm(nn.Module):
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last dimension (arXiv 1607.06450).

    With `unit_offset=True` the factor is `1 + weight`, and weights begin at 0. `x` [..., dim] keeps shape and dtype.

    Raises ConfigurationError for a `dim` below 1 or an `eps` that is not finite and at least 0.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        bias: bool = True,
        unit_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_width("dim", dim)
        check_eps(eps)
        self.dim = dim
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.full((dim,), 0.0 if unit_offset else 1.0, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., dim] to the same shape."""
        return F.layer_norm(x, (self.dim,), _factor(self.weight, self.unit_offset), self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, bias={self.bias is not None}, unit_offset={self.unit_offset}"


def _factor(weight: Tensor, unit_offset: bool) -> Tensor:
    return 1.0 + weight if unit_offset else weight
