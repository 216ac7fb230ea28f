"""Fingerprints of tensors, which recognise an unchanged source, mask or weight without a copy."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .buffers import changed, ordinary

SAMPLES, SAMPLE_BYTES = 4, 32
"""Places of a weight, from end to end, and bytes at each that are compared: a write to the whole of it, which PyTorch
may not count, changes them too."""


@dataclass(frozen=True, slots=True)
class TensorFingerprint:
    """A tensor as it was at one moment, kept without a copy where changes to it can be noticed.

    An ordinary tensor counts its in-place changes, so an alias and the count are enough. A tensor made in inference
    mode counts nothing: of that one a copy is kept, and compared.
    """

    tensor: Tensor
    version: int
    copied: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorFingerprint":
        """The fingerprint of `tensor` as it is now."""
        kept = ordinary(tensor.detach())
        return cls(kept, kept._version, copied=tensor.is_inference())

    def same(self, tensor: Tensor) -> bool:
        """True if `tensor` is the same unmodified memory (the quick way), or has equal content."""
        kept = self.tensor
        if kept._version != self.version:
            return False
        if (kept.shape, kept.dtype, kept.device) != (tensor.shape, tensor.dtype, tensor.device):
            return False
        return self.aliases(tensor) or torch.equal(kept, tensor)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "TensorFingerprint":
        """The same after a move: the kept tensor is then a copy of our own, where the move has made one."""
        tensor = changed(change, self.tensor)
        own = tensor.untyped_storage().data_ptr() != self.tensor.untyped_storage().data_ptr()
        return TensorFingerprint(tensor, tensor._version, self.copied or own)

    def aliases(self, tensor: Tensor) -> bool:
        """True if `tensor` of the same shape is the very memory that is kept."""
        return self.tensor.data_ptr() == tensor.data_ptr() and self.tensor.stride() == tensor.stride()


Projections = tuple[Tensor, ...]
"""The weights that decide the keys and values of a source."""


class WeightFingerprint(NamedTuple):
    """A weight, its count of in-place changes, its address, and the bytes of some of its numbers.

    The sample notices what PyTorch does not count: fused optimisers, writes through `.data` or NumPy, another tensor at
    the same address. A write that misses every sampled number goes unnoticed.
    """

    weight: Tensor
    version: int
    address: int
    sample: bytes

    @classmethod
    def of(cls, weight: Tensor) -> "WeightFingerprint":
        """The fingerprint of a contiguous weight on the CPU, as it is now."""
        return cls(weight, weight._version, weight.data_ptr(), _sampled(weight.data_ptr(), weight.nbytes))

    def same(self, weight: Tensor) -> bool:
        """True if it is the same weight, and no change is noticed."""
        return (
            self.weight is weight
            and self.version == weight._version
            and self.address == weight.data_ptr()
            and self.sample == _sampled(self.address, weight.nbytes)
        )


class ProjectionFingerprint(NamedTuple):
    """Projections as they were when a source went through them."""

    weights: tuple[WeightFingerprint, ...]

    @classmethod
    def of(cls, projections: Projections | None) -> "ProjectionFingerprint | None":
        """The fingerprint of projections as they are now; None where they cannot be recognised again."""
        if projections is None or not all(map(_is_known, projections)):
            return None
        return cls(tuple(map(WeightFingerprint.of, projections)))

    def same(self, projections: Projections | None) -> bool:
        """True if they are the same projections, and no change is noticed."""
        if projections is None or len(self.weights) != len(projections):
            return False
        return all(one.same(weight) for one, weight in zip(self.weights, projections, strict=True))

    def equals(self, other: "ProjectionFingerprint") -> bool:
        """True if both are of the same projections, unchanged in between."""
        return self.same(tuple(one.weight for one in other.weights)) and all(
            one[1:] == another[1:] for one, another in zip(self.weights, other.weights, strict=True)
        )


def _is_known(weight: Tensor) -> bool:
    """True if changes to a weight are noticed without an operation; on another device the host would have to wait."""
    return weight.is_cpu and weight.is_contiguous() and not weight.is_inference()


def _sampled(address: int, nbytes: int) -> bytes:
    # Read by address: an operation of PyTorch for each weight would cost five times as much.
    if nbytes <= SAMPLES * SAMPLE_BYTES:
        return ctypes.string_at(address, nbytes)
    apart = (nbytes - SAMPLE_BYTES) // (SAMPLES - 1)
    return b"".join(ctypes.string_at(address + number * apart, SAMPLE_BYTES) for number in range(SAMPLES))
