"""Decoding of rows of tokens: with caches, or with a whole forward for each token."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..cache import KnownMask, KVCache, on_device
from ..errors import NonFiniteError
from .model_adapter import ModelAdapter
from .options import GenerationOptions
from .prefill import PromptProgress, chunk_size, chunks, room
from .progress import finite_rows, non_finite
from .prompt import Prompt
from .session import Session


class Decoding(ABC):
    """Rows that a model continues. Logits are float32 [B, V], or float64 if the logits of the model are."""

    def __init__(self, adapter: ModelAdapter, session: Session) -> None:
        self.adapter = adapter
        self.session = session

    @abstractmethod
    def begin(self, prompt: Prompt) -> Tensor:
        """Reads the prompt, and gives the first logits."""

    @abstractmethod
    def advance(self, tokens: Tensor, live: KnownMask | None) -> Tensor:
        """Reads the next token [B] of each row, or of the `live` rows (bool [B, 1]), and gives the next logits."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order."""

    def repeat(self, rows: int, copies: int) -> None:
        """Makes so many copies, one after the other, of each of its `rows`."""
        if copies > 1:
            self.select([row for row in range(rows) for _ in range(copies)])

    def read(self, tokens: Tensor, mask: KnownMask | None, known: bool) -> Tensor:
        """Logits after `tokens` [B, L], or vectors [B, L, E]. `known`: the ids are in the vocabulary."""
        return self._read(self.adapter.read, tokens, mask, known)

    def read_prefix(self, tokens: Tensor, mask: KnownMask | None, lengths: Tensor) -> Tensor:
        """As `read` of a prompt, or of one and what follows it: the first `lengths` int64 [B] tokens see each other."""
        return self._read(partial(self.adapter.read_prefix, lengths=lengths), tokens, mask, self.adapter.known_prompt)

    def _read(
        self, function: Callable[[Tensor, Tensor | None], Tensor], tokens: Tensor, mask: KnownMask | None, known: bool
    ) -> Tensor:
        generation = self.session.generation
        generation.source, generation.source_mask = self.adapter.source or (None, None)
        logits = self.session.read(function, tokens, mask, known)
        return logits if logits.dtype == torch.float64 else logits.float()


class CachedDecoding(Decoding):
    """Decoding with caches: each token is read once. A prompt is read in chunks, into caches that have room for it."""

    def __init__(self, adapter: ModelAdapter, session: Session, cache: KVCache, options: GenerationOptions) -> None:
        super().__init__(adapter, session)
        self.cache = cache
        self._options = options

    def begin(self, prompt: Prompt) -> Tensor:
        options = self._options
        if options.num_beams == options.num_return_sequences == 1:
            self.session.reserve(room(prompt, options.limits(prompt.lengths)))
        else:
            # Rows of one prompt share its tokens, and keep new ones in buffers of their own.
            self.session.reserve(prompt.columns)
        return self.read_prompt(prompt, options.prompt_progress_callback)

    def read_prompt(self, prompt: Prompt, progress: PromptProgress | None = None, *, continues: bool = False) -> Tensor:
        """Logits after a prompt, which is read in chunks; `progress` is told how far.

        `continues`: these tokens follow a prompt, in causal order.
        """
        options, session = self._options, self.session
        size = chunk_size(options.prefill_chunk_size, prompt, session.compresses, session.shortest_window)
        inputs, mask, columns = prompt.inputs, prompt.mask, prompt.columns
        lengths = None
        if options.bidirectional_prompt and not continues:
            size, lengths = columns, on_device(prompt.lengths, inputs.device)
        logits = inputs.new_empty(0)
        if progress is not None:
            progress(0, columns)
        for part in chunks(columns, size):
            self.session.make_room(min(part.stop, columns) - part.start)
            if lengths is not None:
                logits = self.read_prefix(inputs, mask, lengths)
            else:
                logits = self.read(inputs[:, part], mask and mask.columns(part), self.adapter.known_prompt)
            if progress is not None:
                progress(min(part.stop, columns), columns)
        return logits

    def advance(self, tokens: Tensor, live: KnownMask | None) -> Tensor:
        return self.read(tokens.unsqueeze(-1), live, True)

    def read_each(self, tokens: Tensor, mask: KnownMask | None) -> Tensor:
        """Logits [B, L, V] after each of `tokens` [B, L], which are in the vocabulary."""
        return self._read(partial(self.adapter.read_last, count=tokens.shape[1]), tokens, mask, True)

    def select(self, rows: Sequence[int]) -> None:
        self.cache.select(rows)
        self.adapter.select(rows)


class UncachedDecoding(Decoding):
    """Decoding without caches: all tokens are read again for each new token."""

    def __init__(self, adapter: ModelAdapter, session: Session, options: GenerationOptions) -> None:
        super().__init__(adapter, session)
        self._inputs = torch.empty(0, device="cpu")
        self._mask: KnownMask | None = None
        self._lengths: Tensor | None = None
        self._options = options

    def begin(self, prompt: Prompt) -> Tensor:
        self._inputs, self._mask = prompt.inputs, prompt.mask
        if self._options.bidirectional_prompt:
            self._lengths = on_device(prompt.lengths, self._inputs.device)
        progress = self._options.prompt_progress_callback or (lambda *_: None)
        progress(0, prompt.columns)
        logits = self._read_all()
        progress(prompt.columns, prompt.columns)
        return logits

    def advance(self, tokens: Tensor, live: KnownMask | None) -> Tensor:
        column = tokens.unsqueeze(-1)
        if live is not None or self._mask is not None:
            own, new = self._mask or KnownMask.all_real(self._inputs), live or KnownMask.all_real(column)
            self._mask = own.followed_by(new)
        if self._inputs.ndim == 3:
            column = self.adapter.embedded(column)
        self._inputs = torch.cat((self._inputs, column), 1)
        return self._read_all()

    def select(self, rows: Sequence[int]) -> None:
        kept = on_device(rows, self._inputs.device)
        self._inputs, self._lengths = self._inputs[kept], None if self._lengths is None else self._lengths[kept]
        self._mask = self._mask and self._mask.rows(rows)
        self.adapter.select(rows)

    def _read_all(self) -> Tensor:
        if self._lengths is not None:
            return self.read_prefix(self._inputs, self._mask, self._lengths)
        return self.read(self._inputs, self._mask, self.adapter.known_prompt)


def checked(logits: Tensor, live: Tensor | None, step: int) -> Tensor:
    """The logits [B, V] for processors of the user's own, with 0 in rows that are not `live` (bool [B, 1]; None: all).

    Raises NonFiniteError, with the rows and the step, if logits of live rows are not finite.
    """
    if live is not None:
        logits = logits.masked_fill(~live, 0.0)
    wrong = _rows_without(finite_rows(logits))
    if wrong:
        raise non_finite(wrong, step)
    return logits


def checked_choice(logits: Tensor, live: Tensor | None, step: int) -> Tensor:
    """Processed logits [B, V], with 0 in rows that are not `live`.

    Raises NonFiniteError, with the rows and the step, if logits of live rows are NaN or +Inf, or all -Inf.
    """
    if live is not None:
        logits = logits.masked_fill(~live, 0.0)
    wrong = _rows_without(logits.amax(-1).isfinite())
    if wrong:
        raise NonFiniteError(
            f"processors: expected at least one finite logit per row, and no NaN or +Inf, got other logits in rows "
            f"{wrong} at step {step}"
        )
    return logits


def _rows_without(right: Tensor) -> list[int]:
    return [row for row, each in enumerate(right.tolist()) if not each]
