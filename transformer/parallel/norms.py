"""Norms that are whole on each rank: over the stream, or over the rank's heads, whose gradients are then summed."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import LayerNorm, RMSNorm
from ..kernels import layer_norm, rms_norm
from .parts import LocalWeights, Reader


class LocalNorm(LocalWeights):
    """A norm that computes with this rank's parameters, as `read` gives them."""

    read: Reader


class LocalRMSNorm(LocalNorm, RMSNorm):
    """`RMSNorm` that is whole on each rank."""

    token_wise = True

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., dim] to the same shape."""
        return rms_norm(x, self.read(self._parameters["weight"]), self.eps, self.unit_offset)  # type: ignore[arg-type]


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
