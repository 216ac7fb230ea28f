"""Root mean square and layer normalisation, each also with weights as offsets from one."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import require_count, require_number
from ..kernels import layer_norm, rms_norm
from ..signatures import typed_as


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last dimension (arXiv 1910.07467).

    With `unit_offset=True` the factor is `1 + weight`, and weights begin at 0 (Gemma, arXiv 2403.08295). Statistics of
    16-bit tensors, and that factor, are computed in float32. The result has the shape of `x` [..., dim] and its dtype,
    or the dtype of the weights if that is narrower: a 16-bit branch reads a float32 stream in 16 bits.

    Raises ConfigurationError for a `dim` below 1 or an `eps` that is not finite and at least 0.
    """

    token_wise = True

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
        """Sets the weights to neutral values, as the constructor does."""
        nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., dim] to the same shape."""
        # A weight that is parametrized or sharded stands elsewhere than in the registry, which costs a fifth.
        weight = self._parameters.get("weight")
        return rms_norm(x, self.weight if weight is None else weight, self.eps, self.unit_offset)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, unit_offset={self.unit_offset}"

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...


class LayerNorm(nn.Module):
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last dimension (arXiv 1607.06450).

    With `unit_offset=True` the factor is `1 + weight`, and weights begin at 0. Statistics of 16-bit tensors, and that
    factor, are computed in float32. The shape and the dtype of the result are those of `RMSNorm`.

    Raises ConfigurationError for a `dim` below 1 or an `eps` that is not finite and at least 0.
    """

    token_wise = True

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
        """Sets the weights and the bias to neutral values, as the constructor does."""
        nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., dim] to the same shape."""
        weight = self._parameters.get("weight")
        return layer_norm(x, self.weight if weight is None else weight, self.bias, self.eps, self.unit_offset)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, bias={self.bias is not None}, unit_offset={self.unit_offset}"

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...
