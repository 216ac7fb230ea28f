"""Norms over ranks: whole on each rank, over the stream or over each of its heads, or over the heads of all ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import LayerNorm, RMSNorm
from ..kernels import layer_norm, rms_norm
from .parts import LocalWeights, Reader
from .ranks import Ranks


class LocalNorm(LocalWeights):
    """A norm that computes with this rank's parameters, as `read` gives them."""

    read: Reader


class LocalRMSNorm(LocalNorm, RMSNorm):
    """`RMSNorm` that is whole on each rank."""

    token_wise = True

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., dim] to the same shape."""
        return rms_norm(x, self.read(self._parameters["weight"]), self.eps, self.unit_offset)  # type: ignore[arg-type]


class HeadsRMSNorm(LocalNorm, RMSNorm):
    """`RMSNorm` over the heads of all ranks together, of which this rank has some: ranks sum the squares."""

    token_wise = True
    ranks: Ranks

    def forward(self, x: Tensor) -> Tensor:
        """This rank's `x` [B, L, dim / ranks] to the same shape."""
        weight: Tensor = self.read(self._parameters["weight"])  # type: ignore[assignment]
        wide = x.to(torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32))
        # Each rank's share depends on the sum, so its gradients are those of all ranks.
        squares = self.ranks.copied(self.ranks.summed(wide.square().sum(-1, keepdim=True)))
        factor = weight.to(wide.dtype)
        normed = wide * torch.rsqrt(squares / self.dim + self.eps) * (1.0 + factor if self.unit_offset else factor)
        return normed.to(weight.dtype if x.dtype is wide.dtype else x.dtype)


class LocalLayerNorm(LocalNorm, LayerNorm):
    """`LayerNorm` that is whole on each rank."""

    token_wise = True

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., dim] to the same shape."""
        weight, bias = self.read(self._parameters["weight"]), self.read(self._parameters["bias"])
        return layer_norm(x, weight, bias, self.eps, self.unit_offset)  # type: ignore[arg-type]


class LocalTorchRMSNorm(LocalNorm, nn.RMSNorm):
    """`torch.nn.RMSNorm` that is whole on each rank."""

    token_wise = True

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., dim] to the same shape."""
        return F.rms_norm(x, self.normalized_shape, self.read(self._parameters["weight"]), self.eps)


class LocalTorchLayerNorm(LocalNorm, nn.LayerNorm):
    """`torch.nn.LayerNorm` that is whole on each rank."""

    token_wise = True

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., dim] to the same shape."""
        weight, bias = self.read(self._parameters["weight"]), self.read(self._parameters["bias"])
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
