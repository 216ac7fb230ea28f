"""Ends of rows: by a token, a sequence of tokens, text, a criterion of the user, or time."""

from collections.abc import Sequence
from time import monotonic
from typing import Literal

import torch
from torch import Tensor

from ..errors import ArgumentError, DtypeError, ShapeError
from .row_options import Criterion
from .rows import Row

StopReason = Literal["stop_token", "stop_sequence", "stop_string", "criterion", "time", "length"]
"""The reason why a row has ended."""

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The character that an incomplete character is decoded to."""

EXTRA_TOKENS = 8
"""Tokens that are decoded with those that a stop string can be made of: a text's beginning can depend on what is before
it, as in tokens of bytes and in spaces that a decoder strips."""


def stop_reason(row: Row, written: Sequence[int]) -> StopReason | None:
    """The reason why the last of the new tokens ends a row; None if it goes on."""
    options = row.options
    if len(written) > (options.min_new_tokens or 0):
        if written[-1] in options.stop_tokens:
            return "stop_token"
        if any(tuple(written[-len(sequence) :]) == sequence for sequence in options.stop_sequences):
            return "stop_sequence"
        if options.stop_strings and completes_text(row, written):
            return "stop_string"
    return "length" if len(written) == row.limit else None


def completes_text(row: Row, written: Sequence[int]) -> bool:
    """True if the last token completes a stop string, which may begin and end inside of tokens."""
    strings, tokenizer = row.options.stop_strings, row.options.tokenizer
    if tokenizer is None:
        return False
    tokens = (*row.prompt, *written) if row.prompt else written
    # Each token of a stop string has at least a byte of it, except special tokens, which can have no text.
    enough = max(len(each.encode("utf-8", "surrogatepass")) for each in strings) + EXTRA_TOKENS
    text, first = "", max(len(tokens) - enough, 0)
    while True:
        text = tokenizer.decode(list(tokens[first:]))
        if not first or (len(text) >= enough and not text.startswith(UNFINISHED)):
            break
        first = max(first - (1 if len(text) >= enough else enough), 0)
    if not any(each in text for each in strings):
        return False
    # The text up to the token may have had the string already, as one that ended it must not.
    before = _common_prefix(tokenizer.decode(list(tokens[first:-1])), text)
    return any(text.rfind(each) + len(each) > before for each in strings if each in text)


def _common_prefix(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def by_criteria(criteria: Sequence[Criterion], input_ids: Tensor, scores: Tensor) -> list[bool]:
    """Whether criteria of the user end each of the rows: bool [B], of their tokens so far and the latest scores.

    Raises ArgumentError, DtypeError or ShapeError for a result that is neither a bool nor bool [B].
    """
    ended = [False] * input_ids.shape[0]
    for criterion in criteria:
        given = criterion(input_ids, scores)
        ended = [a or b for a, b in zip(ended, _checked(criterion, given, len(ended)), strict=True)]
    return ended


def _checked(criterion: Criterion, given: object, rows: int) -> list[bool]:
    name = getattr(criterion, "__name__", type(criterion).__name__)
    expected = f"stopping_criteria: {name}: expected a bool, or bool [{rows}], from criterion(input_ids, scores)"
    if isinstance(given, bool):
        return [given] * rows
    if not isinstance(given, Tensor):
        raise ArgumentError(f"{expected}, got {type(given).__name__}")
    if given.dtype != torch.bool:
        raise DtypeError(f"{expected}, got {given.dtype}")
    if given.numel() != 1 and given.shape != (rows,):
        raise ShapeError(f"{expected}, got {list(given.shape)}")
    return given.flatten().tolist() * (rows if given.numel() == 1 else 1)


class Deadline:
    """Time limit of one generation, in seconds from now; None: no limit."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else monotonic() + seconds

    def is_over(self) -> bool:
        """True if the time is over."""
        return self._end is not None and monotonic() > self._end
