"""Tokens that options force or exclude at the beginning and at the end of a row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import on_device
from ..errors import ArgumentError, shown
from .rows import Row

Pairs = tuple[list[int], list[int]]
"""Rows and tokens, as an index of scores [B, V]."""


class Edges:
    """Tokens that rows may not choose now, by `min_new_tokens` and `forced_bos_token_id`, `forced_eos_token_id`."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._latest: tuple[list[tuple[int, ...]], list[tuple[int, ...]]] = [], []
        self._index: tuple[list[Tensor], list[Tensor]] = [], []

    @staticmethod
    def are_needed(rows: Sequence[Row]) -> bool:
        """True if an option of a row forces or excludes tokens."""
        return any(
            (row.options.min_new_tokens and row.options.stop_tokens)
            or row.options.forced_eos_token_id
            or row.options.forced_bos_token_id is not None
            for row in rows
        )

    def __call__(self, scores: Tensor, new: Sequence[int]) -> Tensor:
        """The scores [B, V] of tokens that follow `new` new tokens of each row: -inf for those that must not.

        A forced token has the score 0. Raises ArgumentError for a forced token outside the vocabulary.
        """
        forced = [row.forced_tokens(count) for row, count in zip(self._rows, new, strict=True)]
        excluded = [
            () if own else row.excluded_tokens(count) for row, count, own in zip(self._rows, new, forced, strict=True)
        ]
        if not any(forced) and not any(excluded):
            return scores
        if (forced, excluded) != self._latest:
            self._latest = forced, excluded
            self._index = self._forced(forced, scores), self._excluded(excluded, scores)
        scores = scores.clone()
        if self._index[0]:
            rows, index, tokens = self._index[0]
            scores.index_fill_(0, rows, -torch.inf).index_put_((index, tokens), scores.new_zeros(()))
        if self._index[1]:
            index, tokens = self._index[1]
            scores.index_put_((index, tokens), scores.new_full((), -torch.inf))
        return scores

    @staticmethod
    def _forced(of_rows: Sequence[tuple[int, ...]], scores: Tensor) -> list[Tensor]:
        rows, tokens = _pairs(of_rows)
        wrong = [token for token in tokens if token >= scores.shape[-1]]
        if wrong:
            raise ArgumentError(
                f"forced_bos_token_id, forced_eos_token_id: expected ids below {scores.shape[-1]}, the size of the "
                f"vocabulary, got {shown(wrong[0])}"
            )
        return [on_device(each, scores.device) for each in (sorted(set(rows)), rows, tokens)] if rows else []

    @staticmethod
    def _excluded(of_rows: Sequence[tuple[int, ...]], scores: Tensor) -> list[Tensor]:
        # A stop token outside the vocabulary never comes.
        known = [tuple(token for token in tokens if token < scores.shape[-1]) for tokens in of_rows]
        if any(len(set(tokens)) == scores.shape[-1] for tokens in known):
            raise ArgumentError(
                "min_new_tokens: expected a token that does not end a row, got the whole vocabulary as stop_tokens"
            )
        pairs = _pairs(known)
        return [on_device(each, scores.device) for each in pairs] if pairs[0] else []


def _pairs(of_rows: Sequence[tuple[int, ...]]) -> Pairs:
    pairs = [(row, token) for row, tokens in enumerate(of_rows) for token in tokens]
    return [row for row, _ in pairs], [token for _, token in pairs]
