"""Reader of an encoder-decoder for generation: one encoded source, and target tokens over it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..generation import ModelAdapter, Session, UseCache, is_sharded
from .cached import CachedModel


class SourceReader(ModelAdapter):
    """Reads target tokens over one encoded source, and forms logits of the last column alone."""

    known_prompt = True

    def __init__(self, model: CachedModel, states: Tensor, source_mask: Tensor | None) -> None:
        self.model = model
        self.sharded = is_sharded(model)
        self.states = states
        self.source_mask = source_mask

    def read(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        logits: Tensor = self.model(
            encoder_hidden_states=self.states,
            target_ids=tokens,
            source_mask=self.source_mask,
            target_mask=attention_mask,
            logits_to_keep=1,
        )
        return logits[:, -1]

    def select(self, rows: Sequence[int]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            index = torch.tensor(rows, device=self.states.device)
            self.states = self.states[index]
            self.source_mask = None if self.source_mask is None else self.source_mask[index]

    def session(self, use_cache: UseCache, max_new_tokens: int) -> Session:
        return self.model.session(use_cache, max_new_tokens, begins=True)

    def check_room(self, session: Session, prompts: Sequence[int], new: Sequence[int]) -> None:
        self.model.check_room(session, prompts, new)
