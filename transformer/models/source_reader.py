"""Reader of encoded sources for generation: the logits of target tokens over them."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..attention import real_in_every_row
from ..cache import KnownInputs, on_device, run_uncached
from ..errors import ArgumentError, ShapeError
from ..generation import (
    GenerationKeywords,
    ModelAdapter,
    Session,
    UseCache,
    generation_options,
    is_sharded,
)
from ..generation.model_adapter import no_prefix
from ..generation.shared_by_ranks import check_ranks
from .cached import CachedModel
from .inputs import check_one
from .tokens import checked_ids


class SourceReader(ModelAdapter):
    """Adapter that gives the logits of the last target token, over one encoded source."""

    known_prompt = True

    def __init__(self, model: CachedModel, states: Tensor, source_mask: Tensor | None) -> None:
        self.model = model
        self.sharded = is_sharded(model)
        self.source: tuple[Tensor, Tensor | None] = states, source_mask
        self._rows = list(range(states.shape[0]))

    def read(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.read_last(tokens, attention_mask, 1)[:, 0]

    def read_prefix(self, tokens: Tensor, attention_mask: Tensor | None, lengths: Tensor) -> Tensor:  # noqa: ARG002
        raise no_prefix(self.model)

    def read_last(self, tokens: Tensor, attention_mask: Tensor | None, count: int) -> Tensor:
        states, source_mask = self.source
        logits: Tensor = self.model(
            encoder_hidden_states=states,
            target_ids=tokens,
            source_mask=source_mask,
            target_mask=attention_mask,
            logits_to_keep=count,
        )
        return logits

    def select(self, rows: Sequence[int]) -> None:
        chosen = [self._rows[row] for row in rows]
        if chosen == self._rows:
            # Beams of one source took each other's place.
            return
        states, source_mask = self.source
        with torch.inference_mode(False), torch.no_grad():
            index = on_device(rows, states.device)
            self.source = states[index], None if source_mask is None else source_mask[index]
        self._rows = chosen

    def session(self, use_cache: UseCache, max_new_tokens: int) -> Session:
        return self.model.session(use_cache, max_new_tokens, begins=True)

    def check_room(self, session: Session, prompts: Sequence[int], new: Sequence[int]) -> None:
        self.model.check_room(session, prompts, new)


class Source(NamedTuple):
    """The source of a generation as a caller gave it, and the names of ids and mask in the caller's signature."""

    ids: Tensor
    mask: Tensor | None
    vocab_size: int | None
    """None: `ids` are vectors."""
    names: tuple[str, str] = ("source_ids", "source_mask")

    @classmethod
    def given(
        cls, ids: Tensor | None, mask: Tensor | None, inputs_embeds: Tensor | None, vocab_size: int | None
    ) -> "Source":
        """The source in ids, or in vectors. Raises ArgumentError unless it is one of the two."""
        check_one(source_ids=ids, inputs_embeds=inputs_embeds)
        if inputs_embeds is not None:
            return cls(inputs_embeds, mask, None, ("inputs_embeds", "source_mask"))
        return cls(cast("Tensor", ids), mask, vocab_size)


class Target(NamedTuple):
    """The prompt of the decoder as a caller gave it, int64 [B, L], and the names of ids and mask in its signature."""

    ids: Tensor | None
    mask: Tensor | None
    vocab_size: int
    names: tuple[str, str] = ("target_ids", "target_mask")

    def after(self, start_token: int) -> tuple[Tensor | None, Tensor | None]:
        """The ids behind the start token, and their mask. The ids stay as they are if each row begins with it.

        Raises ArgumentError, ShapeError, DtypeError or DeviceError for ids or a mask that are none, and ArgumentError
        if only some of the rows begin with the start token.
        """
        name, mask_name = self.names
        if self.ids is None:
            if self.mask is not None:
                raise ArgumentError(f"{mask_name}: expected None without {name}, got a tensor")
            return None, None
        ids = checked_ids(name, self.ids, self.vocab_size, mask_name, self.mask)
        if 0 in ids.shape:
            raise ShapeError(f"{name}: expected at least one row and one token, got {list(ids.shape)}")
        known = real_in_every_row(mask_name, self.mask, ids.shape[0], ids.shape[1], ids.device)
        real = None if known is None else known.mask
        first = ids[:, :1] if real is None else ids.take_along_dim(real.byte().argmax(-1, keepdim=True), 1)
        begins = (first == start_token).flatten().tolist()
        if all(begins):
            return ids, real
        if any(begins):
            raise ArgumentError(
                f"{name}: expected the start token {start_token} at the beginning of all rows or of none, got it in "
                f"rows {[row for row, each in enumerate(begins) if each]}"
            )
        start = torch.full_like(first, start_token)
        whole = torch.cat((start, ids), 1)
        return whole, None if real is None else torch.cat((torch.ones_like(start, dtype=torch.bool), real), 1)


def begin_targets(
    model: CachedModel, source: Source, target: Target, start_token: int, options: GenerationKeywords
) -> tuple[SourceReader, Tensor, Tensor | None]:
    """Encodes the sources of a generation: their reader, and the first tokens int64 [B, L] of the targets, with a mask.

    The host looks at ids and masks once. Raises as `EncoderDecoderTransformer.generate`, and where only options are
    wrong before the sources are encoded.
    """
    begun, begun_mask = target.after(start_token)
    ids, mask, known, (name, mask_name) = source.ids, source.mask, None, source.names
    if not isinstance(ids, Tensor):
        raise ArgumentError(f"{name}: expected a tensor, got {type(ids).__name__}; give torch.as_tensor(ids)")
    if 0 in ids.shape:
        raise ShapeError(f"{name}: expected at least one row and one token, got {list(ids.shape)}")
    rows = ids.shape[0] if ids.ndim > 1 else 1
    if begun is not None and begun.shape[0] != rows:
        raise ShapeError(f"{target.names[0]}: expected {rows} rows, as {name} has, got {list(begun.shape)}")
    lengths = [1] * rows if begun is None else [begun.shape[1]] * rows
    if begun_mask is not None:
        lengths = begun_mask.sum(-1).tolist()
    limits = generation_options(options).limits(lengths)
    session = model.session(options.get("use_cache", True), max(limits), begins=True)
    model.check_room(session, lengths, limits)
    if ids.ndim > 1:
        known = real_in_every_row(mask_name, mask, ids.shape[0], ids.shape[1], ids.device)
        mask = None if known is None else known.mask
    if source.vocab_size is not None:
        ids = checked_ids(name, ids, source.vocab_size, mask_name, mask)
    if is_sharded(model):
        check_ranks(model.modules(), {name: source.ids, mask_name: source.mask}, generation_options(options))
    # No inference tensor: it has no version counter, and caches would have to compare the source by its content.
    with torch.inference_mode(False), torch.no_grad():
        encode = partial(model, inputs_embeds=ids) if name == "inputs_embeds" else partial(model, ids)
        states: Tensor = run_uncached(KnownInputs(ids, known), partial(encode, source_mask=mask))
    if begun is None:
        begun = torch.full((states.shape[0], 1), start_token, dtype=torch.int64, device=states.device)
    return SourceReader(model, states, mask), begun, begun_mask
