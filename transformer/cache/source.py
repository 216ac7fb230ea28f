"""What cross-attention keeps of its source, and the check that it still is the same source."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .storage import changed

Weights = tuple[tuple[Tensor, int, int], ...]
"""Weights, how often each had been changed in place, and where its numbers lay (`.data` may be put elsewhere)."""


@dataclass(frozen=True, slots=True)
class Witness:
    """A tensor as it was at one moment, kept without a copy where changes to it can be noticed.

    An ordinary tensor counts its in-place changes, so an alias and the count are enough. A tensor made in inference
    mode counts nothing: of that one a copy is kept, and compared.
    """

    tensor: Tensor
    version: int
    copied: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> "Witness":
        """A witness of `tensor` as it is now."""
        kept = _ordinary(tensor.detach())
        return cls(kept, kept._version, copied=tensor.is_inference())

    def same(self, tensor: Tensor) -> bool:
        """Whether `tensor` is what it was: the same unmodified memory is the quick yes, equal content is a yes too."""
        kept = self.tensor
        if kept._version != self.version:
            return False
        if (kept.shape, kept.dtype, kept.device) != (tensor.shape, tensor.dtype, tensor.device):
            return False
        return self.aliases(tensor) or torch.equal(kept, tensor)

    def aliases(self, tensor: Tensor) -> bool:
        """Whether `tensor` of the same shape is the very memory that is kept."""
        return self.tensor.data_ptr() == tensor.data_ptr() and self.tensor.stride() == tensor.stride()


@dataclass(frozen=True, slots=True)
class Source:
    """Projected keys and values [B, G, S, D] of an external `kv`, and what they were made from."""

    key: Tensor
    value: Tensor
    kv: Witness
    mask: Witness | None
    weights: Weights | None

    @classmethod
    def of(cls, key: Tensor, value: Tensor, kv: Tensor, mask: Tensor | None, weights: Weights | None) -> "Source":
        """What is kept of a source that was just projected."""
        return cls(
            _ordinary(key), _ordinary(value), Witness.of(kv), None if mask is None else Witness.of(mask), weights
        )

    def made_from(self, kv: Tensor, mask: Tensor | None, weights: Weights | None) -> bool:
        """Whether the same source, mask and weights come in again."""
        if self.weights is None or weights is None or not _same_weights(self.weights, weights):
            return False
        if (mask is None) != (self.mask is None):
            return False
        if mask is not None and self.mask is not None and not self.mask.same(mask):
            return False
        return self.kv.same(kv)

    def witnessed(self, kv: Tensor) -> "Source":
        """The same after equal content came in as another tensor: that one is the quick yes from now on."""
        if self.kv.aliases(kv) or kv.is_inference():
            return self
        return replace(self, kv=Witness.of(kv))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Source":
        """The same after a move: keys, values and the kept source go along."""
        if self.kv.tensor._version != self.kv.version:
            # The caller has changed the kept source since: after a move nothing would tell.
            return replace(self, key=changed(change, self.key), value=changed(change, self.value), weights=None)
        return replace(
            self,
            key=changed(change, self.key),
            value=changed(change, self.value),
            kv=Witness.of(changed(change, self.kv.tensor)),
            mask=None if self.mask is None else Witness.of(changed(change, self.mask.tensor)),
        )

    def copied(self) -> "Source":
        """A detached copy, which cannot know the weights of the module that it will serve: projected anew there."""
        return replace(self.mapped(lambda tensor: tensor.detach().clone()), weights=None)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, and of the source where a copy of it is kept."""
        return self.key.nbytes + self.value.nbytes + (self.kv.tensor.nbytes if self.kv.copied else 0)


def versions(modules: Sequence[nn.Module | None]) -> Weights | None:
    """Every weight of these modules and how often it was changed in place; None where a weight does not count that."""
    found = []
    for tensor in _weights(modules):
        if tensor.is_inference():
            return None
        found.append((tensor, tensor._version, tensor.data_ptr()))
    return tuple(found)


def _ordinary(tensor: Tensor) -> Tensor:
    """The tensor itself, or an ordinary copy of one that was made in inference mode, so that it may be kept."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


def _weights(modules: Iterable[nn.Module | None]) -> Iterator[Tensor]:
    for module in modules:
        if module is not None:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    yield tensor
            yield from _weights(module._modules.values())


def _same_weights(kept: Weights, now: Weights) -> bool:
    if len(kept) != len(now):
        return False
    return all(old[0] is new[0] and old[1:] == new[1:] for old, new in zip(kept, now, strict=True))
