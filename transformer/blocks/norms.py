"""Root mean square and layer normalisation, each also with weights that count from one."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import require_count, require_number
from ..signatures import typed_as
from ..tracing import is_traced, real_tensors

FEW_ROWS = 8
"""Rows up to which one token each is normed by products."""

with real_tensors(), torch.inference_mode(False):
    ONE = torch.ones(1, 1, 1, dtype=torch.float32, device="cpu")
    """What `eps` is times, where a product adds it."""


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last dimension (arXiv 1910.07467).

    With `unit_offset=True` the factor is `1 + weight`, and weights begin at 0 (Gemma, arXiv 2403.08295). Statistics of
    16-bit tensors, and that factor, are formed in float32. `x` [..., dim] keeps its shape, and its dtype unless the
    weights have a narrower one: a 16-bit branch reads a float32 stream in 16 bits.

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
        require_count("dim", dim)
        require_number("eps", eps, least=0.0)
        self.dim = dim
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weights to what scales nothing, as the constructor does."""
        nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., dim] to the same shape."""
        x_wide, factor, dtype = _together(x, self.weight, self.unit_offset)
        if _one_token(x_wide):
            # Four operations instead of eight: a tenth of a decode step of many small layers was norms.
            size = torch.baddbmm(ONE, x_wide, x_wide.transpose(1, 2), beta=self.eps, alpha=1.0 / self.dim)
            return (x_wide * size.rsqrt_() * factor).to(dtype)
        return F.rms_norm(x_wide, (self.dim,), factor, self.eps).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, unit_offset={self.unit_offset}"

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...


class LayerNorm(nn.Module):
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last dimension (arXiv 1607.06450).

    With `unit_offset=True` the factor is `1 + weight`, and weights begin at 0. Statistics of 16-bit tensors, and that
    factor, are formed in float32. `x` [..., dim] keeps its shape and dtype, as in `RMSNorm`.

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
        require_count("dim", dim)
        require_number("eps", eps, least=0.0)
        self.dim = dim
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weights to what scales nothing and adds nothing, as the constructor does."""
        nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., dim] to the same shape."""
        x_wide, factor, dtype = _together(x, self.weight, self.unit_offset)
        bias = None if self.bias is None else self.bias.to(factor.dtype)
        return F.layer_norm(x_wide, (self.dim,), factor, bias, self.eps).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, bias={self.bias is not None}, unit_offset={self.unit_offset}"

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...


def _one_token(x: Tensor) -> bool:
    """Whether `x` [B, 1, dim] is a decode step of few rows on the CPU."""
    # No size is asked for while traced.
    return (
        x.is_cpu
        and x.dtype is torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not is_traced(x)
        and x.ndim == 3
        and x.shape[1] == 1
        and 0 < x.shape[0] <= FEW_ROWS
    )


def _together(x: Tensor, weight: Tensor, unit_offset: bool) -> tuple[Tensor, Tensor, torch.dtype]:
    """`x` and the factor in one dtype: their own where it is the same, else the wider one; float32 for an offset.

    The third is the dtype of the result: the narrower one. They differ under autocast, whose 16-bit products meet
    weights in float32, and where a 16-bit model keeps its stream in float32.
    """
    dtype = weight.dtype
    if x.dtype is dtype:
        if not unit_offset:
            return x, weight, dtype
        wide = torch.promote_types(dtype, torch.float32)
    else:
        wide = torch.promote_types(x.dtype, dtype)
        dtype = dtype if x.dtype is wide else x.dtype
        if unit_offset:
            wide = torch.promote_types(wide, torch.float32)
    factor = weight.to(wide)
    return x.to(wide), 1.0 + factor if unit_offset else factor, dtype
