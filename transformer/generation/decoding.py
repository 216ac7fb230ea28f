"""Decoding of rows of tokens: with caches, or with a whole forward for each token."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import KVCache
from ..errors import NonFiniteError
from .model_adapter import ModelAdapter
from .session import Session


class Decoding(ABC):
    """Rows that a model continues. Logits are float32 [B, V], or float64 if the logits of the model are."""

    @abstractmethod
    def begin(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        """Reads the prompt [B, L], with padding on the left where `real` is false, and gives the first logits."""

    @abstractmethod
    def advance(self, tokens: Tensor, live: Tensor | None) -> Tensor:
        """Reads the next token [B] of each row, or of the `live` rows (bool [B]), and gives the next logits."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order."""


class CachedDecoding(Decoding):
    """Decoding with caches: each token is read once. A prompt is read `chunk` tokens at a time."""

    def __init__(self, adapter: ModelAdapter, session: Session, cache: KVCache, chunk: int | None = None) -> None:
        self.adapter = adapter
        self.session = session
        self.cache = cache
        self.chunk = chunk

    def begin(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        size = min(self.chunk or tokens.shape[1], tokens.shape[1])
        logits = tokens.new_empty(0)
        for first in range(0, tokens.shape[1], size):
            part = slice(first, first + size)
            mask = None if real is None else real[:, part]
            logits = self.session.read(self.adapter.read, tokens[:, part], mask, self.adapter.known_prompt)
        return _upcast(logits)

    def advance(self, tokens: Tensor, live: Tensor | None) -> Tensor:
        column = None if live is None else live.unsqueeze(-1)
        return _upcast(self.session.read(self.adapter.read, tokens.unsqueeze(-1), column, True))

    def select(self, rows: Sequence[int]) -> None:
        self.cache.select(rows)
        self.adapter.select(rows)


class UncachedDecoding(Decoding):
    """Decoding without caches: all tokens are read again for each new token."""

    def __init__(self, adapter: ModelAdapter, session: Session) -> None:
        self.adapter = adapter
        self.session = session
        self._tokens = torch.empty(0, device="cpu")
        self._real: Tensor | None = None

    def begin(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        self._tokens, self._real = tokens, real
        return self._read()

    def advance(self, tokens: Tensor, live: Tensor | None) -> Tensor:
        if live is not None and self._real is None:
            self._real = torch.ones_like(self._tokens, dtype=torch.bool)
        if self._real is not None:
            column = torch.ones_like(tokens, dtype=torch.bool) if live is None else live
            self._real = torch.cat((self._real, column.unsqueeze(-1)), 1)
        self._tokens = torch.cat((self._tokens, tokens.unsqueeze(-1)), 1)
        return self._read()

    def select(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self._tokens.device)
        self._tokens = self._tokens[index]
        self._real = None if self._real is None else self._real[index]
        self.adapter.select(rows)

    def _read(self) -> Tensor:
        return _upcast(self.session.read(self.adapter.read, self._tokens, self._real, self.adapter.known_prompt))


def checked(logits: Tensor, live: Tensor | None, step: int) -> Tensor:
    """The logits [B, V], with 0 in rows that are not `live` (bool [B]; None: all are live).

    Raises NonFiniteError, with the rows and the step, if logits of live rows are not finite.
    """
    if live is not None:
        logits = logits.masked_fill(~live.unsqueeze(-1), 0.0)
    least, most = logits.aminmax(dim=-1)
    wrong = _rows_where(~(least.isfinite() & most.isfinite()))
    if wrong:
        raise NonFiniteError(
            f"logits: expected finite numbers, got NaN or Inf in rows {wrong} at step {step}; look for them in the "
            "weights, or use a wider dtype"
        )
    return logits


def checked_choice(logits: Tensor, live: Tensor | None, step: int) -> Tensor:
    """Processed logits [B, V], with 0 in rows that are not `live`.

    Raises NonFiniteError, with the rows and the step, if logits of live rows are NaN or +Inf, or all -Inf.
    """
    if live is not None:
        logits = logits.masked_fill(~live.unsqueeze(-1), 0.0)
    wrong = _rows_where(~logits.amax(-1).isfinite())
    if wrong:
        raise NonFiniteError(
            f"processors: expected at least one finite logit per row, and no NaN or +Inf, got other logits in rows "
            f"{wrong} at step {step}"
        )
    return logits


def _rows_where(wrong: Tensor) -> list[int]:
    return wrong.nonzero().flatten().tolist()


def _upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
