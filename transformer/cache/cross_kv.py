"""Projected source of cross-attention, as a cache keeps it, and the check that the source is still the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codecs import Coding
from .buffers import allocated, changed, mapped_coding, ordinary
from .fingerprint import ProjectionFingerprint, Projections, TensorFingerprint
from .known_inputs import Generation
from .lengths import on_device


@dataclass(frozen=True, slots=True)
class CrossKV:
    """Projected keys and values [B, G, S, D] of an external `kv`, and what they were made from.

    With a `coding` they are records, uint8 [B, G, S, bytes].
    """

    key: Tensor
    value: Tensor
    kv: TensorFingerprint | None = None
    """None where keys and values were given as they are: what they were made from is not known."""
    mask: TensorFingerprint | None = None
    projections: ProjectionFingerprint | None = None
    generation: Generation | None = None
    """The generation in which it was projected: as long as that runs, its weights are taken to be the same."""
    given_by_generation: bool = False
    """True if it was projected from the generation's own source, which is then known without a look at its numbers."""
    rows: tuple[int, ...] | None = None
    """For each row the row of the projected source that it has; None: as it was projected."""
    coding: Coding | None = None

    @classmethod
    def of(
        cls,
        key: Tensor,
        value: Tensor,
        kv: Tensor,
        mask: Tensor | None,
        projections: Projections | None,
        generation: Generation | None = None,
        coding: Coding | None = None,
    ) -> "CrossKV":
        """The keys and values of a source that was just projected (projections None: never recognised again)."""
        masked = None if mask is None else TensorFingerprint.of(mask)
        known = ProjectionFingerprint.of(projections)
        own = generation is not None and generation.gives(kv, mask)
        kept = cls.given(key, value, coding)
        return replace(
            kept,
            kv=TensorFingerprint.of(kv),
            mask=masked,
            projections=known,
            generation=generation,
            given_by_generation=own,
        )

    @classmethod
    def given(cls, key: Tensor, value: Tensor, coding: Coding | None = None) -> "CrossKV":
        """Keys and values that the caller has projected, kept as they are, or as records of theirs."""
        if coding is not None:
            key, value = coding.encoded(key, value)
        return cls(ordinary(key), ordinary(value), coding=coding)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which keys are read."""
        return self.key.dtype if self.coding is None else self.coding.dtype

    @property
    def like(self) -> Tensor:
        """Some of the keys, or none of them, for their rows, dtype and device."""
        return self.key if self.coding is None else self.coding.decoded_key(self.key[:, :, :0])

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """The numbers, [B, G, S, D] each."""
        return (self.key, self.value) if self.coding is None else self.coding.decoded(self.key, self.value)

    def made_from(
        self, kv: Tensor, mask: Tensor | None, projections: Projections | None, generation: Generation | None = None
    ) -> bool:
        """True if the same source and mask come in again, and would be projected as they were."""
        if self.kv is None or (mask is None) != (self.mask is None):
            return False
        if generation is None or self.generation is not generation:
            known = self.projections
            if known is None or not known.same(projections):
                return False
        elif self.given_by_generation and generation.gives(kv, mask):
            return self._unchanged()
        if mask is not None and self.mask is not None and not self.mask.same(mask):
            return False
        return self.kv.same(kv)

    def known_as(self, kv: Tensor) -> "CrossKV":
        """The same after equal content came in as another tensor, which is recognised by its memory from now on."""
        if self.kv is None or self.kv.aliases(kv) or kv.is_inference():
            return self
        return replace(self, kv=TensorFingerprint.of(kv))

    def selected(self, chosen: Sequence[int]) -> "CrossKV":
        """The same in these rows, in this order; itself where each row has the same source again, as beams of it do."""
        rows = self.rows or tuple(range(self.key.shape[0]))
        of_chosen = tuple(rows[row] for row in chosen)
        if of_chosen == rows:
            return self
        index = on_device(chosen, self.key.device)
        return replace(self.mapped(lambda tensor: tensor.index_select(0, index)), rows=of_chosen)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "CrossKV":
        """The same after a move, or in other rows: keys, values and the kept source go along."""
        coding = None if self.coding is None else mapped_coding(change, self.coding, self.key)
        changed_self = replace(self, key=changed(change, self.key), value=changed(change, self.value), coding=coding)
        if self.kv is None:
            return changed_self
        if not self._unchanged():
            # The caller has changed the kept source since: after a move that could not be noticed.
            return replace(changed_self, projections=None, generation=None)
        return replace(changed_self, kv=self.kv.mapped(change), mask=self.mask and self.mask.mapped(change))

    def copied(self) -> "CrossKV":
        """A detached copy, which cannot know the weights of the module that it will serve: projected anew there."""
        return replace(self.mapped(lambda tensor: tensor.detach().clone()), projections=None, generation=None)

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def concatenated(cls, sources: "Sequence[CrossKV]") -> "CrossKV":
        """The rows of all sources in one batch; shorter ones are padded at their end with zeros, and masked there."""
        width = max(source.key.shape[2] for source in sources)
        key = torch.cat([F.pad(source.key, (0, 0, 0, width - source.key.shape[2])) for source in sources])
        value = torch.cat([F.pad(source.value, (0, 0, 0, width - source.value.shape[2])) for source in sources])
        first, coding = sources[0].projections, sources[0].coding
        kept = [source.kv.tensor for source in sources if source.kv is not None and source._unchanged()]
        if len(kept) < len(sources) or not all(_same_projections(source.projections, first) for source in sources):
            return cls(key, value, coding=coding)
        kv = torch.cat([F.pad(tensor, (0, 0, 0, width - tensor.shape[1])) for tensor in kept])
        real = torch.cat([F.pad(source.real(), (0, width - source.key.shape[2])) for source in sources])
        mask = None if bool(real.all()) else TensorFingerprint(real, real._version, copied=True)
        return cls(key, value, TensorFingerprint(kv, kv._version, copied=True), mask, first, coding=coding)

    def _unchanged(self) -> bool:
        """True if the kept source and mask are still those that keys and values were made from."""
        return all(w is None or w.tensor._version == w.version for w in (self.kv, self.mask))

    @property
    def made_of(self) -> tuple[Tensor | None, Tensor | None]:
        """The source and the mask that keys and values were made from; None where these are not known any more."""
        if not self._unchanged():
            return None, None
        return (None if self.kv is None else self.kv.tensor), (None if self.mask is None else self.mask.tensor)

    def real(self) -> Tensor:
        """bool [B, S], true for the source's tokens."""
        if self.mask is not None:
            return self.mask.tensor
        return torch.ones(self.key.shape[0], self.key.shape[2], dtype=torch.bool, device=self.key.device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys and values, and the source where a copy of it is kept."""
        copies = (each.tensor for each in (self.kv, self.mask) if each is not None and each.copied)
        return self.key, self.value, *copies

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return allocated(self.tensors)


def _same_projections(one: ProjectionFingerprint | None, other: ProjectionFingerprint | None) -> bool:
    """True if two sources were projected by the same weights."""
    return one is other if one is None or other is None else one.equals(other)
