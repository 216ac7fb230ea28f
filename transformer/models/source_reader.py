"""Reader of encoded sources for generation: the logits of target tokens over them."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import real_in_every_row
from ..cache import KnownInputs, on_device, run_uncached
from ..errors import ArgumentError, ShapeError
from ..generation import GenerationKeywords, ModelAdapter, Session, UseCache, generation_options, is_sharded
from .cached import CachedModel
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
        states, source_mask = self.source
        logits: Tensor = self.model(
            encoder_hidden_states=states,
            target_ids=tokens,
            source_mask=source_mask,
            target_mask=attention_mask,
            logits_to_keep=1,
        )
        return logits[:, -1]

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


def begin_targets(
    model: CachedModel, source: Source, start_token: int, options: GenerationKeywords
) -> tuple[SourceReader, Tensor]:
    """Encodes the sources of a generation: their reader, and the start tokens int64 [B, 1] of the targets.

    The host looks at ids and mask once. Raises as `EncoderDecoderTransformer.generate`, and where only options are
    wrong before the sources are encoded.
    """
    max_new_tokens = max(generation_options(options).limits([1]))
    session = model.session(options.get("use_cache", True), max_new_tokens, begins=True)
    model.check_room(session, [1], [max_new_tokens])
    ids, mask, known, (name, mask_name) = source.ids, source.mask, None, source.names
    if not isinstance(ids, Tensor):
        raise ArgumentError(f"{name}: expected a tensor, got {type(ids).__name__}; give torch.as_tensor(ids)")
    if 0 in ids.shape:
        raise ShapeError(f"{name}: expected at least one row and one token, got {list(ids.shape)}")
    if ids.ndim > 1:
        known = real_in_every_row(mask_name, mask, ids.shape[0], ids.shape[1], ids.device)
        mask = None if known is None else known.mask
    if source.vocab_size is not None:
        ids = checked_ids(name, ids, source.vocab_size, mask_name, mask)
    # No inference tensor: it has no version counter, and caches would have to compare the source by its content.
    with torch.inference_mode(False), torch.no_grad():
        states: Tensor = run_uncached(KnownInputs(ids, known), partial(model, ids, source_mask=mask))
    start = torch.full((states.shape[0], 1), start_token, dtype=torch.int64, device=states.device)
    return SourceReader(model, states, mask), start
