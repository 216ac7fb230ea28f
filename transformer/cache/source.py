"""What cross-attention keeps of its source, and the check that it still is the same source."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .storage import allocated, changed, ordinary

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
        kept = ordinary(tensor.detach())
        return cls(kept, kept._version, copied=tensor.is_inference())

    def same(self, tensor: Tensor) -> bool:
        """Whether `tensor` is what it was: the same unmodified memory is the quick yes, equal content is a yes too."""
        kept = self.tensor
        if kept._version != self.version:
            return False
        if (kept.shape, kept.dtype, kept.device) != (tensor.shape, tensor.dtype, tensor.device):
            return False
        return self.aliases(tensor) or torch.equal(kept, tensor)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Witness":
        """The same after a move: what is kept is then a copy of our own, where it is another tensor."""
        tensor = changed(change, self.tensor)
        own = tensor.untyped_storage().data_ptr() != self.tensor.untyped_storage().data_ptr()
        return Witness(tensor, tensor._version, self.copied or own)

    def aliases(self, tensor: Tensor) -> bool:
        """Whether `tensor` of the same shape is the very memory that is kept."""
        return self.tensor.data_ptr() == tensor.data_ptr() and self.tensor.stride() == tensor.stride()


@dataclass(frozen=True, slots=True)
class Source:
    """Projected keys and values [B, G, S, D] of an external `kv`, and what they were made from."""

    key: Tensor
    value: Tensor
    kv: Witness | None = None
    """None where keys and values were given as they are, so that nothing can tell what they were made from."""
    mask: Witness | None = None
    weights: Weights | None = None

    @classmethod
    def of(cls, key: Tensor, value: Tensor, kv: Tensor, mask: Tensor | None, weights: Weights | None) -> "Source":
        """What is kept of a source that was just projected."""
        return cls(ordinary(key), ordinary(value), Witness.of(kv), None if mask is None else Witness.of(mask), weights)

    @classmethod
    def given(cls, key: Tensor, value: Tensor) -> "Source":
        """Keys and values that nobody here has projected, kept as they are."""
        return cls(ordinary(key), ordinary(value))

    def made_from(self, kv: Tensor, mask: Tensor | None, weights: Weights | None) -> bool:
        """Whether the same source, mask and weights come in again."""
        if self.kv is None or self.weights is None or weights is None or not _same_weights(self.weights, weights):
            return False
        if (mask is None) != (self.mask is None):
            return False
        if mask is not None and self.mask is not None and not self.mask.same(mask):
            return False
        return self.kv.same(kv)

    def witnessed(self, kv: Tensor) -> "Source":
        """The same after equal content came in as another tensor: that one is the quick yes from now on."""
        if self.kv is None or self.kv.aliases(kv) or kv.is_inference():
            return self
        return replace(self, kv=Witness.of(kv))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Source":
        """The same after a move, or in other rows: keys, values and the kept source go along."""
        key, value = changed(change, self.key), changed(change, self.value)
        if self.kv is None:
            return replace(self, key=key, value=value)
        if not self._unchanged():
            # The caller has changed the kept source since: after a move nothing would tell.
            return replace(self, key=key, value=value, weights=None)
        return replace(
            self, key=key, value=value, kv=self.kv.mapped(change), mask=self.mask and self.mask.mapped(change)
        )

    def copied(self) -> "Source":
        """A detached copy, which cannot know the weights of the module that it will serve: projected anew there."""
        return replace(self.mapped(lambda tensor: tensor.detach().clone()), weights=None)

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def side_by_side(cls, sources: "Sequence[Source]") -> "Source":
        """The rows of all sources in one batch; shorter ones are padded at their end with zeros, and masked there."""
        width = max(source.key.shape[2] for source in sources)
        key = torch.cat([F.pad(source.key, (0, 0, 0, width - source.key.shape[2])) for source in sources])
        value = torch.cat([F.pad(source.value, (0, 0, 0, width - source.value.shape[2])) for source in sources])
        weights = sources[0].weights or ()
        kept = [source.kv.tensor for source in sources if source.kv is not None and source._unchanged()]
        if len(kept) < len(sources) or not all(_same_weights(source.weights or (), weights) for source in sources):
            return cls(key, value)
        kv = torch.cat([F.pad(tensor, (0, 0, 0, width - tensor.shape[1])) for tensor in kept])
        real = torch.cat([F.pad(source.real(), (0, width - source.key.shape[2])) for source in sources])
        mask = None if bool(real.all()) else Witness(real, real._version, copied=True)
        return cls(key, value, Witness(kv, kv._version, copied=True), mask, weights or None)

    def _unchanged(self) -> bool:
        """Whether what is kept is what keys and values were made from."""
        return all(w is None or w.tensor._version == w.version for w in (self.kv, self.mask))

    def real(self) -> Tensor:
        """bool [B, S], true for the source's tokens."""
        if self.mask is not None:
            return self.mask.tensor
        return torch.ones(self.key.shape[0], self.key.shape[2], dtype=torch.bool, device=self.key.device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys and values, and the source where a copy of it is kept."""
        copies = (witness.tensor for witness in (self.kv, self.mask) if witness is not None and witness.copied)
        return self.key, self.value, *copies

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return allocated(self.tensors)


def versions(modules: Sequence[nn.Module | None]) -> Weights | None:
    """Every weight of these modules and how often it was changed in place; None where a weight does not count that."""
    found = []
    for tensor in _weights(modules):
        if tensor.is_inference():
            return None
        found.append((tensor, tensor._version, tensor.data_ptr()))
    return tuple(found)


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
